"""What DeepSpeed gathers, sends and allocates under ZeRO; nothing of it is imported.

The rules mirror DeepSpeed 0.19.8, and each names the function that it follows (paths within
deepspeed/runtime). Should DeepSpeed change one, tests/planner/test_deepspeed.py fails: there two
ranks send the bytes that are counted here to 0.05 %, and keep the state to 3 %. That test needs no
GPU and so covers all but quantization (qwZ, qgZ) and hpZ, which are read from the source alone.
"""

import math
from bisect import bisect
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from irpe_ds.planner.communication import Collective, Group
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.profile import Call, Parameter, Profile
from irpe_ds.planner.zero import Zero
from irpe_ds.provenance import package_versions

MIRRORED = "0.19"
"""The minor version whose behaviour is counted."""
STAGE0_BUCKET = 500_000_000
"""Elements: MEMORY_OPT_ALLREDUCE_SIZE of engine.py."""
FP32 = 4
"""Bytes."""
QUANTIZED_GROUP = 8000
"""Elements with one fp32 scale under qwZ: CUDAQuantizer.target_group_size."""


def version_note() -> str | None:
    """What to tell a user of another minor version of DeepSpeed, or of none."""
    installed = package_versions().get("deepspeed")
    if installed is not None and installed.split(".")[:2] == MIRRORED.split("."):
        return None
    return (
        f"memory and bytes are counted for DeepSpeed {MIRRORED}, but "
        f"{installed or 'no DeepSpeed'} is installed"
    )


def numel(parameters: Iterable[Parameter]) -> int:
    """Elements of all of them."""
    return sum(p.numel for p in parameters)


def padded(parameters: Iterable[Parameter], ranks: int) -> int:
    """Elements of parameters that are each padded to equal parts on all ranks."""
    return sum(_padded(p, ranks) for p in parameters)


def _padded(parameter: Parameter, ranks: int) -> int:
    return math.ceil(parameter.numel / ranks) * ranks


def flat_groups(profile: Profile, ranks: int) -> list[int]:
    """Elements of the flat tensor that stages 1 and 2 make of each group of the optimizer.

    stage_1_and_2.py, flatten_dense_tensors_aligned: a multiple of nccl_start_alignment_factor (2)
    times the ranks.
    """
    sizes: Counter[int | None] = Counter()
    for p in profile.trained:
        sizes[p.group] += p.numel
    return [math.ceil(size / (2 * ranks)) * 2 * ranks for size in sizes.values()]


def shard_size(profile: Profile, zero: Zero, ranks: int) -> int:
    """Elements whose optimizer state one rank has."""
    if zero.stage == 0:
        return numel(profile.trained)
    if zero.stage < 3:
        return sum(flat_groups(profile, ranks)) // ranks
    return padded(profile.trained, ranks) // ranks


def split(profile: Profile, zero: Zero) -> tuple[list[Parameter], list[Parameter]]:
    """Stage 3's parameters: the partitioned, and the persistent, which stay whole.

    zero/parameter_offload.py, mark_persistent_parameters.
    """
    limit = zero.stage3_param_persistence_threshold
    persistent = [p for p in profile.parameters if p.numel <= limit]
    return [p for p in profile.parameters if p.numel > limit], persistent


def gathered_again(profile: Profile, zero: Zero) -> list[Parameter]:
    """Partitioned parameters that are released in a micro-step and gathered a second time.

    None with DeepSpeed's defaults in a model of less than 500 million parameters.
    """
    times = Counter(gathered(profile.call, profile.parameters, zero).names)
    return [p for p in profile.parameters if times[p.name] > 1]


class Gathered(NamedTuple):
    """What stage 3 gathers in one forward and backward pass."""

    names: list[str]
    """In this order."""
    most: int
    """Elements that are there at a time, of partitioned parameters."""


def gathered(call: Call, parameters: Sequence[Parameter], zero: Zero) -> Gathered:
    """What stage 3 gathers in one forward and backward pass, by a rehearsal of it.

    zero/partitioned_param_coordinator.py. fetch_sub_module: before a module runs, its missing
    parameters are gathered, then the next ones on the trace of all uses, up to the size of a
    prefetch bucket and to max_live_parameters in all; those that are there already are skipped.
    __params_to_release: after a module has run its parameters are released, except where a later
    use was skipped or is within max_reuse_distance elements.

    In 18 settings of these, tried on the quickstart's model, two ranks send what is counted here:
    12 to the byte, five to 1.5 %, and to 6 % with a distance of twice the model's size.

    Args:
        call: the outermost module.
        parameters: all of the model.
    """
    sizes = {p.name: p.numel for p in parameters}
    partitioned = {n for n in sizes if sizes[n] > zero.stage3_param_persistence_threshold}
    events = [*_events(call), *_backward(call)]
    modules = [names for begins, names in events if begins]
    trace = deque((name, number) for number, names in enumerate(modules) for name in names)
    uses: dict[str, list[int]] = {name: [] for name in sizes}
    for name, number in trace:
        uses[name].append(number)
    passed = [0]
    for names in modules:
        passed.append(passed[-1] + sum(sizes[name] for name in names))
    order: list[str] = []
    available: set[str] = set()
    live = most = 0
    fetched_for: dict[str, int] = {}  # the last use of each parameter that was taken off the trace

    def gather(names: Sequence[str]) -> int:
        nonlocal live, most
        new = [name for name in names if name in partitioned and name not in available]
        order.extend(new)
        available.update(new)
        size = sum(sizes[name] for name in new)
        live += size
        most = max(most, live)
        return size

    def take() -> str:
        name, number = trace.popleft()
        fetched_for[name] = number
        return name

    current = 0
    for begins, names in events:
        if begins:
            gather(names)
            wanted = {name for name in names if fetched_for.get(name, -1) < current}
            while trace and wanted:
                wanted.discard(take())
            prefetched, room = 0, zero.stage3_max_live_parameters - live
            while trace and prefetched < min(room, zero.stage3_prefetch_bucket_size):
                prefetched += gather([take()])
            current += 1
            continue
        for name in names:
            later = uses[name][bisect(uses[name], current - 1) :]
            near = later and passed[later[0]] - passed[current] < zero.stage3_max_reuse_distance
            if name in available and fetched_for.get(name, -1) <= current and not near:
                available.remove(name)
                live -= sizes[name]
    return Gathered(order, most)


def _events(call: Call) -> Iterator[tuple[bool, Sequence[str]]]:
    """When modules begin (True) and have run (False), with their parameters."""
    yield True, call.parameters
    for inner in call.calls:
        yield from _events(inner)
    yield False, call.parameters


def _backward(call: Call) -> Iterator[tuple[bool, Sequence[str]]]:
    """The same of the backward pass, which does not come to all of them."""
    if not call.is_trained:
        return
    yield True, call.parameters
    for inner in reversed(call.calls):
        yield from _backward(inner)
    yield False, call.parameters


def collectives(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> list[Collective]:
    """Everything that one update sends, except a few bytes such as norms."""
    if cluster.gpus == 1:
        return []
    if zero.stage == 0:
        # engine.py, buffered_allreduce_fallback: once an update, nothing overlaps.
        payload = numel(profile.trained) * gradient_bytes(profile, zero)
        calls = math.ceil(numel(profile.trained) / STAGE0_BUCKET)
        return [Collective(kind="all_reduce", payload=payload, calls=calls, content="gradients")]
    if zero.stage < 3:
        return list(_stage_1_or_2(profile, zero, cluster, accumulation))
    return list(_stage_3(profile, zero, cluster, accumulation))


def gradient_bytes(profile: Profile, zero: Zero) -> int:
    """Bytes per gradient element when sent, except for layers that autocast sends in half."""
    default = profile.bytes if zero.zero_quantized_gradients else FP32
    return zero.communication_bytes or default


def _stage_1_or_2(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    # engine.py, allreduce_gradients: stage 1 reduces at the end of an update, stage 2 in every
    # micro-step. stage_1_and_2.py, average_tensor: by all-reduce (use_multi_rank_bucket_allreduce),
    # there is no reduce-scatter.
    times = accumulation if zero.stage == 2 else 1
    yield from _reduce("all_reduce", profile, zero, profile.trained, 1, times)
    groups = flat_groups(profile, cluster.gpus)
    payload = sum(groups) * profile.bytes
    yield Collective(kind="all_gather", payload=payload, calls=len(groups), content="parameters")


def _stage_3(
    profile: Profile, zero: Zero, cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    partitioned, persistent = split(profile, zero)
    # hpZ: the first gather of an update is from all ranks, as invalidate_secondary_tensor in
    # stage3.py drops the copy after every update; the others are in the node.
    near: Group = "node" if zero.zero_hpz_partition_size > 1 else "all"
    from_all = accumulation if near == "all" else 1
    yield from _gather(profile, zero, cluster, partitioned, from_all, "forward", "all")
    rest = accumulation - from_all
    yield from _gather(profile, zero, cluster, partitioned, rest, "forward", near)
    again = gathered_again(profile, zero)
    yield from _gather(profile, zero, cluster, again, accumulation, "backward", near)
    reduced = list(profile.trained)
    if zero.zero_quantized_gradients and cluster.nodes > 1:
        # comm/coalesced_collectives.py, all_to_all_quant_reduce: others are reduce-scattered.
        unit = 2 * cluster.gpus
        quantized = [p for p in reduced if len(p.shape) > 1 and p.numel % unit == 0]
        reduced = [p for p in reduced if p not in quantized]
        yield from _quantized(quantized, cluster, accumulation)
    yield from _reduce("reduce_scatter", profile, zero, reduced, cluster.gpus, accumulation)
    if persistent:
        # stage3.py, _post_step: one by one, once an update.
        payload, calls = padded(persistent, cluster.gpus) * profile.bytes, len(persistent)
        yield Collective(kind="all_gather", payload=payload, calls=calls, content="parameters")


def _gather(
    profile: Profile,
    zero: Zero,
    cluster: Cluster,
    parameters: list[Parameter],
    times: int,
    during: Literal["forward", "backward"],
    group: Group,
) -> Iterator[Collective]:
    """Stage 3's gathers of these parameters in a number of micro-steps."""
    ranks = cluster.gpus if group == "all" else min(zero.zero_hpz_partition_size, cluster.gpus)
    elements = padded(parameters, ranks)
    if not elements or not times:
        return
    # zero/partition_parameters.py, all_gather_coalesced: autocast gathers in half what it computes
    # in half.
    halved = profile.precision == "autocast"
    payload = sum(
        _padded(p, ranks) * (2 if halved and p.half_gradient else profile.bytes) for p in parameters
    )
    calls = math.ceil(elements / max(zero.stage3_prefetch_bucket_size, elements / len(parameters)))
    if zero.zero_quantized_weights:  # int8 and, in a second call, the scales
        payload = elements + 4 * math.ceil(elements / QUANTIZED_GROUP)
        calls *= 2
    yield Collective(
        kind="all_gather",
        payload=times * payload,
        calls=times * calls,
        content="parameters",
        group=group,
        overlaps=during if zero.overlap_comm else None,
        exposed=min(1.0, zero.stage3_prefetch_bucket_size / elements),
    )


def _reduce(
    kind: Literal["all_reduce", "reduce_scatter"],
    profile: Profile,
    zero: Zero,
    parameters: Iterable[Parameter],
    ranks: int,
    times: int,
) -> Iterator[Collective]:
    """Gradients in buckets, padded to the number of ranks; the last bucket is exposed.

    torch_autocast.py, get_comm_dtype: under autocast there are buckets of two types.
    """
    kinds: dict[int, list[Parameter]] = {}
    for p in parameters:
        size = 2 if p.half_gradient else 4
        size = size if profile.precision == "autocast" else gradient_bytes(profile, zero)
        kinds.setdefault(size, []).append(p)
    bucket = zero.reduce_bucket_size
    for size, found in sorted(kinds.items()):
        elements = padded(found, ranks)
        yield Collective(
            kind=kind,
            payload=times * elements * size,
            calls=times * math.ceil(elements / bucket),
            content="gradients",
            overlaps="backward" if zero.overlap_comm else None,
            exposed=(elements % bucket or bucket) / elements,
        )


def _quantized(
    parameters: list[Parameter], cluster: Cluster, accumulation: int
) -> Iterator[Collective]:
    """qgZ: int4 and its fp32 scales, each parameter by itself, first in the node.

    comm/coalesced_collectives.py, all_to_all_quant_reduce.
    """
    node = cluster.per_node
    scales = [max(p.shape[0], p.shape[1], cluster.gpus) for p in parameters]
    inside = sum(p.numel // 2 for p in parameters) + 4 * sum(scales)
    between = sum(p.numel // (2 * node) for p in parameters) + 4 * sum(n // node for n in scales)
    sides: tuple[tuple[int, Group], ...] = ((inside, "node"), (between, "across"))
    for payload, group in sides:
        yield Collective(
            kind="all_to_all",
            payload=accumulation * payload,
            calls=2 * accumulation * len(parameters),
            content="gradients",
            group=group,
        )


def weight_memory(profile: Profile, zero: Zero, ranks: int) -> tuple[int, int]:
    """Bytes on the GPU and on the host of the weights that the model computes with.

    Stage 3: a rank's own part, hpZ's second copy, and the gathered.
    """
    if zero.stage == 0:
        return profile.numel * profile.bytes, 0
    if zero.stage < 3:
        frozen = profile.numel - numel(profile.trained)
        return (sum(flat_groups(profile, ranks)) + frozen) * profile.bytes, 0
    _, persistent = split(profile, zero)
    own = padded(profile.parameters, ranks) // ranks * profile.bytes
    most = gathered(profile.call, profile.parameters, zero).most
    whole = (most + numel(persistent)) * profile.bytes
    hpz = zero.zero_hpz_partition_size
    second = profile.numel * profile.bytes // min(hpz, ranks) if hpz > 1 else 0
    on_host = own if zero.offload_param else 0
    return own - on_host + second + whole, on_host


def weight_memory_between_updates(profile: Profile, zero: Zero, ranks: int) -> int:
    """Bytes of weights that stay on the GPU when an update is over; stage 3 has released copies."""
    if zero.stage < 3:
        return weight_memory(profile, zero, ranks)[0]
    _, persistent = split(profile, zero)
    own = padded(profile.parameters, ranks) // ranks
    return (own + numel(persistent)) * profile.bytes


def gradient_memory(profile: Profile, zero: Zero, ranks: int) -> int:
    """Bytes of gradients outside of buckets at the end of the backward pass."""
    if zero.stage < 2:
        return numel(profile.trained) * profile.bytes
    return 0 if zero.offload_optimizer else shard_size(profile, zero, ranks) * profile.bytes


def bucket_memory(profile: Profile, zero: Zero, ranks: int) -> int:
    """Bytes of the gradient buckets and of the largest copy of one that is sent."""
    size = gradient_bytes(profile, zero)
    if zero.stage == 0:
        return 0 if ranks == 1 else min(numel(profile.trained), STAGE0_BUCKET) * size
    sent = min(numel(profile.trained), zero.reduce_bucket_size) * size
    # stage_1_and_2.py, setup_buckets: two of each with overlap_comm; stage 3 has one.
    doubled = 2 if zero.overlap_comm and zero.stage < 3 else 1
    return sent + allocated_buckets(profile, zero) * doubled


def allocated_buckets(profile: Profile, zero: Zero) -> int:
    """Bytes of a bucket, or under autocast of one for each type.

    Allocated at full size: stage_1_and_2.py, setup_buckets, where autocast's are both fp32, and
    stage3.py, _setup_for_real_optimizer, where they are of the type that is sent.
    """
    if not zero.contiguous_gradients:
        return 0
    if profile.precision != "autocast":
        size = gradient_bytes(profile, zero) if zero.stage == 3 else profile.bytes
        return zero.reduce_bucket_size * size
    return zero.reduce_bucket_size * (2 + 4 if zero.stage == 3 else 2 * 4)
