"""What lies in the memory of a GPU at its fullest, by ZeRO stage, under DeepSpeed 0.19."""

from dataclasses import dataclass, fields

from irpe_ds.config import RunConfig
from irpe_ds.planner.communication import (
    STAGE0_BUCKET,
    flat_groups,
    gradient_bytes,
    padded,
    released,
    split,
)
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.zero import Zero

MASTER, MOMENTS, AVERAGE = 4, 8, 4
"""Bytes for a weight of its fp32 master, of AdamW's two moments, of the moving average."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, and on its host for it."""

    weights: int
    """What the model computes with, gathered copies of stage 3 included."""
    gradients: int
    optimizer: int
    """Masters in fp32 and AdamW's moments."""
    ema: int
    """The moving average, and the model that it is evaluated in."""
    activations: int
    buckets: int
    """Gradients on their way: the bucket, and the copy that is sent."""
    update: int
    """Only during the update, when activations and buckets are gone: fp32 gradients."""
    context: int
    """CUDA, NCCL and the libraries; assumed."""
    between_updates: int
    """What stays when an update is over; a part of the above."""
    host: int
    """Not on the GPU: what is offloaded."""

    @property
    def total(self) -> int:
        """Bytes on the GPU at its fullest."""
        lasting = self.weights + self.gradients + self.optimizer + self.ema + self.context
        return lasting + max(self.activations + self.buckets, self.update)

    def gib(self) -> dict[str, float]:
        """All of it in GiB, by name, with the total."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: size / 2**30 for name, size in (*named.items(), ("total", self.total))}


def memory(
    profile: Profile,
    zero: Zero,
    cluster: Cluster,
    config: RunConfig,
    micro_batch: int,
    context_gib: float,
) -> Memory:
    """The memory of a training run of so many images in a forward pass of one GPU."""
    average = config.train.ema_decay is not None
    shard = shard_size(profile, zero, cluster.gpus)
    half = config.train.precision in ("bf16", "fp16")
    # Stage 0 updates fp32 parameters as they are, every other case has masters of its own.
    masters = 0 if zero.stage == 0 and not half else MASTER
    states, on_average = (masters + MOMENTS) * shard, AVERAGE * shard if average else 0
    weights, host = _weights(profile, zero, cluster.gpus)
    gradients = _gradients(profile, zero, shard)
    between = weights
    if zero.stage == 3:  # whole copies have been let go, the buffers of gradients have not
        _, whole = split(profile, zero)
        own = padded(profile.parameters, cluster.gpus) // cluster.gpus
        between = (own + sum(p.numel for p in whole)) * profile.bytes + gradients
        between += _allocated(profile, zero)
    update = MASTER * shard if half or zero.stage else 0
    if zero.offload_optimizer:
        host += states + on_average + MASTER * shard
        states = on_average = update = 0
    evaluated = profile.numel * profile.bytes if average else 0
    between += states + on_average + evaluated
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        ema=on_average + evaluated,
        activations=activations(profile, micro_batch),
        buckets=_buckets(profile, zero, cluster.gpus),
        update=update,
        context=int(context_gib * 2**30),
        between_updates=between,
        host=host,
    )


def shard_size(profile: Profile, zero: Zero, ranks: int) -> int:
    """Weights whose optimizer state one rank has."""
    if zero.stage == 0:
        return profile.numel
    if zero.stage < 3:
        return sum(flat_groups(profile, ranks)) // ranks
    return padded(profile.parameters, ranks) // ranks


def activations(profile: Profile, micro_batch: int) -> int:
    """What is kept for the backward pass, and what that adds while it goes on.

    The backward pass adds gradients of as much as two of the largest tensors. With activations
    computed again, it also keeps those of one block; they are counted for a model without it.
    """
    again = profile.kept_of_block if profile.recompute else 0
    return micro_batch * (profile.kept + 2 * profile.largest + again) + profile.kept_once


def largest_micro_batch(
    profile: Profile, zero: Zero, cluster: Cluster, config: RunConfig, context_gib: float
) -> int:
    """The most images of a forward pass that fit; 0 if not even one does."""
    limit = cluster.gpu.memory_gib * 2**30

    def fits(images: int) -> bool:
        return memory(profile, zero, cluster, config, images, context_gib).total <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _weights(profile: Profile, zero: Zero, ranks: int) -> tuple[int, int]:
    """Bytes on the GPU and on the host of what the model computes with."""
    size = profile.bytes
    if zero.stage == 0:
        return profile.numel * size, 0
    if zero.stage < 3:
        return sum(flat_groups(profile, ranks)) * size, 0
    parted, whole = split(profile, zero)
    own = padded(profile.parameters, ranks) // ranks * size
    again = {p.name for p in released(profile, zero)}
    stays = padded((p for p in parted if p.name not in again), ranks)
    passing = padded((p for p in parted if p.name in again), ranks)
    gathered = stays + min(passing, zero.prefetch_bucket) + sum(p.numel for p in whole)
    second = profile.numel * size // min(zero.partition, ranks) if zero.partition > 1 else 0
    on_host = own if zero.offload_param else 0
    return own - on_host + second + gathered * size, on_host


def _gradients(profile: Profile, zero: Zero, shard: int) -> int:
    """Bytes of gradients that lie outside of buckets when the backward pass ends."""
    if zero.stage < 2:
        return profile.numel * profile.bytes
    return 0 if zero.offload_optimizer else shard * profile.bytes


def _buckets(profile: Profile, zero: Zero, ranks: int) -> int:
    """Bytes of the buckets, which are allocated whole, and of what is sent of them at once."""
    if ranks == 1 and zero.stage == 0:
        return 0
    size = gradient_bytes(profile, zero)
    if zero.stage == 0:
        return min(profile.numel, STAGE0_BUCKET) * size
    sent = min(profile.numel, zero.reduce_bucket) * size
    doubled = 2 if zero.overlap and zero.stage < 3 else 1
    return sent + _allocated(profile, zero) * doubled


def _allocated(profile: Profile, zero: Zero) -> int:
    """Bytes of a bucket, or of one for each kind of number under autocast."""
    if not zero.contiguous:
        return 0
    if profile.precision != "autocast":
        return zero.reduce_bucket * profile.bytes
    return zero.reduce_bucket * (2 + 4 if zero.stage == 3 else 2 * 4)
