"""Peak memory of a GPU, by what it holds and by ZeRO stage."""

from dataclasses import dataclass, fields

from irpe_ds.checkpoint.manifest import MOMENTS
from irpe_ds.config import RunConfig
from irpe_ds.planner.deepspeed import (
    FP32,
    allocated_buckets,
    bucket_memory,
    gradient_memory,
    numel,
    shard_size,
    weight_memory,
    weight_memory_between_updates,
)
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.zero import Zero

MASTER, AVERAGE = FP32, FP32
"""Bytes per weight of its fp32 master, of the moving average."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, and on its host for it."""

    weights: int
    """What the model computes with, including copies that stage 3 gathers."""
    gradients: int
    """With fp32 sums of several micro-steps."""
    optimizer: int
    """fp32 masters and the optimizer's moments."""
    ema: int
    """The moving average."""
    activations: int
    buckets: int
    """Gradients being sent: the bucket, and the copy that is sent."""
    update: int
    """fp32 gradients of the update, when activations and buckets have been freed."""
    context: int
    """CUDA, NCCL and the libraries; assumed."""
    between_updates: int
    """What of the above stays allocated between updates."""
    start: int
    """Peak while the run starts: what stays allocated, and one whole parameter in fp32; below stage
    3 no less than a copy of the model in fp32, in which DeepSpeed is given it."""
    host: int
    """Not on the GPU: what is offloaded."""

    @property
    def total(self) -> int:
        """Peak on the GPU, bytes."""
        always = self.weights + self.gradients + self.optimizer + self.ema + self.context
        return always + max(self.activations + self.buckets, self.update)

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
    """The memory of a training run with this many images in a forward pass of one GPU."""
    ranks, has_ema = cluster.gpus, config.train.ema_decay is not None
    shard = shard_size(profile, zero, ranks)
    half = config.train.precision in ("bf16", "fp16")
    # Stage 0 updates fp32 parameters in place; every other case has separate masters.
    masters = 0 if zero.stage == 0 and not half else MASTER
    moments = FP32 * len(MOMENTS[config.optim.name])
    states, average = (masters + moments) * shard, AVERAGE * shard if has_ema else 0
    weights, host = weight_memory(profile, zero, ranks)
    gradients = gradient_memory(profile, zero, ranks)
    sums = 0
    if half and zero.sums_in_fp32 and config.train.accumulation > 1:
        if zero.stage >= 2:
            gradients *= FP32 // profile.bytes
        else:  # beside the gradients of the micro-step, and kept
            sums = FP32 * numel(profile.trained)
    between = weight_memory_between_updates(profile, zero, ranks) + sums
    if zero.stage == 3:  # which keeps its gradient buffers
        between += gradients + allocated_buckets(profile, zero)
    update = MASTER * shard if half or zero.stage else 0
    if zero.offload_optimizer:
        host += states + average + MASTER * shard
        states = average = update = 0
    between += states + average
    placed = 0 if zero.stage == 3 else FP32 * profile.numel
    largest = max(parameter.numel for parameter in profile.parameters)
    start = max(between - sums, placed) + FP32 * largest + int(context_gib * 2**30)
    return Memory(
        weights=weights,
        gradients=gradients + sums,
        optimizer=states,
        ema=average,
        activations=activations(profile, micro_batch),
        buckets=bucket_memory(profile, zero, ranks),
        update=update,
        context=int(context_gib * 2**30),
        between_updates=between,
        start=start,
        host=host,
    )


def activations(profile: Profile, micro_batch: int) -> int:
    """Bytes saved for the backward pass, and what that pass adds.

    It adds gradients the size of two of the largest tensors. With activation checkpointing it also
    holds what one block saves, which is counted on a model without it.
    """
    block = profile.saved_by_block if profile.recomputed else 0
    return micro_batch * (profile.saved + 2 * profile.largest + block) + profile.saved_once


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
