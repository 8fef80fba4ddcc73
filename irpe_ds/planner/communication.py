"""What DeepSpeed 0.19 sends for one update, by collective, and how long it takes.

The counts follow its sources, and `tests/scaling/` holds them against what two ranks really send:

- stages 1 and 2 all-reduce gradients (use_multi_rank_bucket_allreduce); there is no reduce-scatter
- stage 2 does so in every micro-step, stages 0 and 1 once an update
- stage 3 gathers a parameter once in a micro-step or, where it was let go between forward and
  backward, twice: gathering.py
- parameters below stage3_param_persistence_threshold are gathered one by one, once an update
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from irpe_ds.planner.gathering import gathered
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.profile import Parameter, Profile
from irpe_ds.planner.zero import Zero

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"
REDUCE_SCATTER, ALL_TO_ALL = "reduce_scatter", "all_to_all"
STAGE0_BUCKET = 500_000_000
"""Elements of an all-reduce without ZeRO: MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed's engine."""
QUANTIZED_GROUP = 8000
"""Numbers that share an fp32 scale under qwZ: target_group_size of DeepSpeed's CUDAQuantizer."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind that every rank makes in an update."""

    kind: str
    payload: int
    """Bytes of the whole vector of all calls: in for reductions, out for all-gathers."""
    calls: int
    what: str
    """`gradients` or `parameters`."""
    group: Literal["all", "node", "across"] = "all"
    """All ranks, those of a node, or one of each node."""
    hides_in: Literal["forward", "backward"] | None = None
    """The pass that it may go on beside; None: it is waited for."""
    waited: float = 1.0
    """Share of it that is waited for even then: the first or the last bucket."""

    def ranks(self, cluster: Cluster, partition: int) -> int:
        """Ranks that take part."""
        node = min(cluster.per_node, cluster.gpus)
        return {
            "all": cluster.gpus,
            "node": min(partition, cluster.gpus) if partition > 1 else node,
            "across": cluster.nodes,
        }[self.group]

    def sent(self, ranks: int, backend: str = "nccl") -> float:
        """Bytes that a rank sends by the ring algorithm.

        Gloo has no reduce-scatter: PyTorch all-reduces with it and keeps a part.
        """
        twice = self.kind == ALL_REDUCE or (self.kind == REDUCE_SCATTER and backend == "gloo")
        return (2 if twice else 1) * (ranks - 1) / ranks * self.payload


def collectives(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> list[Collective]:
    """Everything that one update sends but numbers of a few bytes, such as norms."""
    if cluster.gpus == 1:
        return []
    if zero.stage == 0:
        payload = profile.numel * gradient_bytes(profile, zero)
        calls = math.ceil(profile.numel / STAGE0_BUCKET)
        return [Collective(kind=ALL_REDUCE, payload=payload, calls=calls, what="gradients")]
    if zero.stage < 3:
        return list(_stage_1_or_2(profile, zero, cluster, accumulation))
    return list(_stage_3(profile, zero, cluster, accumulation))


def gradient_bytes(profile: Profile, zero: Zero) -> int:
    """Of a number of a gradient on its way, but for layers that autocast sends in half."""
    return zero.communication_bytes or profile.bytes


def padded(parameters: Iterable[Parameter], ranks: int) -> int:
    """Elements of tensors that are each cut into equal parts for so many ranks."""
    return sum(math.ceil(p.numel / ranks) * ranks for p in parameters)


def flat_groups(profile: Profile, ranks: int) -> list[int]:
    """Elements of the flat tensors of stages 1 and 2, which ranks share in even parts."""
    sizes: dict[int, int] = {}
    for p in profile.parameters:
        sizes[p.group] = sizes.get(p.group, 0) + p.numel
    return [math.ceil(size / (2 * ranks)) * 2 * ranks for size in sizes.values()]


def split(profile: Profile, zero: Zero) -> tuple[list[Parameter], list[Parameter]]:
    """Stage 3's parameters: those that are partitioned, and those that stay whole."""
    limit = zero.persistence_threshold
    whole = [p for p in profile.parameters if p.numel < limit]
    return [p for p in profile.parameters if p.numel >= limit], whole


def released(profile: Profile, zero: Zero) -> list[Parameter]:
    """Partitioned parameters that are let go in a micro-step, and gathered again.

    None are with DeepSpeed's defaults, in a model of less than 500 million parameters.
    """
    times = Counter(gathered(profile.call, profile.parameters, zero))
    return [p for p in profile.parameters if times[p.name] > 1]


def _stage_1_or_2(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    times = accumulation if zero.stage == 2 else 1
    for elements, size in _gradients(profile, zero, profile.parameters, 1):
        buckets = max(1, math.ceil(elements / zero.reduce_bucket))
        yield Collective(
            kind=ALL_REDUCE,
            payload=times * elements * size,
            calls=times * buckets,
            what="gradients",
            hides_in="backward" if zero.overlap else None,
            waited=_last_bucket(elements, zero.reduce_bucket),
        )
    groups = flat_groups(profile, cluster.gpus)
    yield Collective(
        kind=ALL_GATHER,
        payload=sum(groups) * profile.bytes,
        calls=len(groups),
        what="parameters",
    )


def _stage_3(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    parted, whole = split(profile, zero)
    again = released(profile, zero)
    near = zero.partition > 1
    # hpZ: the first gather after an update is from all ranks, every other one in the node.
    far_forwards = 1 if near else accumulation
    yield from _gathers(profile, zero, cluster, parted, far_forwards, "forward", "all")
    if near:
        yield from _gathers(profile, zero, cluster, parted, accumulation - 1, "forward", "node")
    group: Literal["all", "node"] = "node" if near else "all"
    yield from _gathers(profile, zero, cluster, again, accumulation, "backward", group)
    yield from _scatters(profile, zero, cluster, accumulation)
    if whole:
        yield Collective(
            kind=ALL_GATHER,
            payload=padded(whole, cluster.gpus) * profile.bytes,
            calls=len(whole),
            what="parameters",
        )


def _gathers(
    profile: Profile,
    zero: Zero,
    cluster: Cluster,
    parameters: list[Parameter],
    times: int,
    during: Literal["forward", "backward"],
    group: Literal["all", "node"],
) -> Iterator[Collective]:
    ranks = cluster.gpus if group == "all" else min(zero.partition, cluster.gpus)
    elements = padded(parameters, ranks)
    if not elements or not times:
        return
    payload = 0
    for half in (True, False):
        part = padded((p for p in parameters if p.half_gradient == half), ranks)
        autocast = half and profile.precision == "autocast"
        payload += part * (2 if autocast else profile.bytes)
    buckets = math.ceil(elements / max(zero.prefetch_bucket, elements / len(parameters)))
    if zero.quantized_weights:
        payload = elements + 4 * math.ceil(elements / QUANTIZED_GROUP)
        buckets *= 2
    yield Collective(
        kind=ALL_GATHER,
        payload=times * payload,
        calls=times * buckets,
        what="parameters",
        group=group,
        hides_in=during if zero.overlap else None,
        waited=min(1.0, zero.prefetch_bucket / elements),
    )


def _scatters(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    plain = list(profile.parameters)
    if zero.quantized_gradients and cluster.nodes > 1:
        unit = 2 * cluster.gpus
        quantized = [p for p in plain if len(p.shape) > 1 and p.numel % unit == 0]
        plain = [p for p in plain if p not in quantized]
        yield from _quantized(quantized, cluster, accumulation)
    for elements, size in _gradients(profile, zero, plain, cluster.gpus):
        yield Collective(
            kind=REDUCE_SCATTER,
            payload=accumulation * elements * size,
            calls=accumulation * max(1, math.ceil(elements / zero.reduce_bucket)),
            what="gradients",
            hides_in="backward" if zero.overlap else None,
            waited=_last_bucket(elements, zero.reduce_bucket),
        )


def _quantized(
    parameters: list[Parameter], cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    """qgZ: int4 and its fp32 scales, each parameter by itself, first in the node."""
    node = cluster.per_node
    groups = [max(p.shape[0], p.shape[1], cluster.gpus) for p in parameters]
    inside = sum(p.numel // 2 for p in parameters) + 4 * sum(groups)
    between = sum(p.numel // (2 * node) for p in parameters) + 4 * sum(g // node for g in groups)
    sides: tuple[tuple[int, Literal["node", "across"]], ...] = (
        (inside, "node"),
        (between, "across"),
    )
    for payload, group in sides:
        yield Collective(
            kind=ALL_TO_ALL,
            payload=accumulation * payload,
            calls=2 * accumulation * len(parameters),
            what="gradients",
            group=group,
        )


def _gradients(
    profile: Profile, zero: Zero, parameters: Iterable[Parameter], ranks: int
) -> list[tuple[int, int]]:
    """Elements and bytes of each: one kind of number, or two under autocast."""
    if profile.precision != "autocast":
        return [(padded(parameters, ranks), gradient_bytes(profile, zero))]
    kinds: dict[int, list[Parameter]] = {2: [], 4: []}
    for p in parameters:
        kinds[2 if p.half_gradient else 4].append(p)
    return [(padded(found, ranks), size) for size, found in kinds.items() if found]


def _last_bucket(elements: int, bucket: int) -> float:
    """Share of gradients that nothing is left to hide behind: the bucket that is filled last."""
    return (elements % bucket or min(bucket, elements)) / elements if elements else 1.0


def seconds(
    collective: Collective, cluster: Cluster, partition: int, link_share: float
) -> tuple[float, float]:
    """Latency and transfer of all its calls, by the fastest protocol on a ring or a tree.

    Args:
        partition: ranks of the second copy of hpZ.
        link_share: share of the links' rates that is reached.
    """
    ranks = collective.ranks(cluster, partition)
    if ranks == 1 or not collective.calls:
        return 0.0, 0.0
    local = min(ranks, cluster.per_node) if collective.group != "across" else 1
    nodes = ranks // local
    rate = cluster.intra
    if nodes > 1:
        between = cluster.inter / (cluster.per_node if collective.group == "across" else 1)
        rate = min(cluster.intra, between) if local > 1 else between
    sent = collective.sent(ranks, cluster.backend)
    transfer = sent / collective.calls / (rate * link_share)
    reduces = collective.kind == ALL_REDUCE
    passes, across = 2 if reduces else 1, nodes if nodes > 1 else 0
    ways = []
    for protocol in cluster.protocols:
        inside, outside = protocol.ring
        steps = max(0, ranks - 1 - across) * inside + min(across, ranks - 1) * outside
        ways.append((protocol.ring_base + passes * steps, transfer / protocol.rate))
        if reduces:
            inside, outside = protocol.tree
            steps = (local - 1) * inside + math.log2(nodes) * outside
            ways.append((protocol.tree_base + passes * steps, transfer / protocol.rate))
    latency, taken = min(ways, key=lambda way: 1e-6 * way[0] + way[1])
    return 1e-6 * latency * collective.calls, taken * collective.calls
