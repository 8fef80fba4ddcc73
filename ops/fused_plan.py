"""What the kernels of csrc/fused are compiled for, and how they are divided up."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from irpe_ds.ops.factors import Factors, has_runs

MAX_SLOTS = 16
MAX_CHUNK_KEYS = 128
"""A chunk is unrolled; beyond, arrays leave the registers."""


class Rpe(NamedTuple):
    """Relative position on keys or values, as the kernels are compiled for it."""

    row_classes: int = 0
    """0: none."""
    slots: int = 8
    """Column classes and, in the last one, the bucket of prefix tokens; 8 or 16."""
    is_bias: bool = False
    runs: bool = True
    """Whether each row class is one run of offsets, as those of product maps are."""

    @classmethod
    def of(cls, factors: Factors, num_prefix: int, is_bias: bool) -> "Rpe":
        """Raises ValueError where the column classes need more than 16 slots."""
        _, rows, columns = factors.buckets.shape
        needed = columns if num_prefix else columns - 1
        if needed > MAX_SLOTS:
            raise ValueError(f"expected at most {MAX_SLOTS} column classes, got {needed}")
        return cls(rows, 8 if needed <= 8 else 16, is_bias, has_runs(factors))


NO_RPE = Rpe()


class Shape(NamedTuple):
    """What a model never changes."""

    dtype: torch.dtype
    head_dim: int
    grid: tuple[int, int]
    num_prefix: int
    # Of `transposed` factors where the lookups belong to the tokens that pass by: on queries in a
    # pass over queries, on keys and values in the pass over keys.
    rpe_q: Rpe = NO_RPE
    rpe_k: Rpe = NO_RPE
    rpe_v: Rpe = NO_RPE
    same_classes: bool = False
    """Whether the terms on keys and on values have the same classes of rows and of columns."""
    has_mask: bool = False
    has_dropout: bool = False

    @property
    def tokens(self) -> int:
        return self.num_prefix + self.grid[0] * self.grid[1]


class Plan(NamedTuple):
    """How the forward is divided up."""

    warps: int
    strips: int
    """Of 16 queries, that a warp works on at a time."""
    stages: int
    """Chunks of keys and values in shared memory."""
    prefetch_q: bool
    """Whether a warp's next queries have a place of their own."""
    chunk_keys: int
    """At most, unless the rows of a smaller chunk make no whole tiles."""
    ring_width: int
    """Places of a grid row in the ring: the grid's width, or padded."""


def plan(shape: Shape, shared_bytes: int, needed: "Needed") -> Plan | None:
    """The first plan that fits in a block's shared memory; None if none does.

    Two strips halve what a warp reads of keys and values, but above 64 numbers a head the
    registers hold one alone. So they do in the pass over keys, unless lookups are on keys alone and
    there is room for values in shared memory. The ring has two chunks, so that one is copied while
    another is used, more where there is room, and one where it must be. Where there are three,
    chunks may be larger; and 11 warps take the place of 8 where they have registers enough for one
    strip, and pass over the ring less often for an image.

    Args:
        needed: forward_bytes, backward_queries_bytes or backward_keys_bytes.
    """
    for plan in _candidates(shape, is_keys=needed is backward_keys_bytes):
        if needed(shape, plan) <= shared_bytes and _chunk_places(shape, plan) <= MAX_CHUNK_KEYS:
            more = (plan._replace(stages=n) for n in range(8, plan.stages, -1))
            return next((x for x in more if needed(shape, x) <= shared_bytes), plan)
    return None


def no_plan_reason(shape: Shape, shared_bytes: int, needed: "Needed") -> str | None:
    """Why no plan fits; None when one does."""
    if plan(shape, shared_bytes, needed) is not None:
        return None
    grid = f"a grid of {shape.grid[0]} x {shape.grid[1]} patches"
    if min(shape.grid[0], 2) * _up(shape.grid[1], 8) > MAX_CHUNK_KEYS:
        return f"{grid} has rows of more than {MAX_CHUNK_KEYS // 2} patches"
    return f"{grid} does not fit in {shared_bytes // 1024} KiB of shared memory"


def _candidates(shape: Shape, is_keys: bool) -> Iterator[Plan]:
    height, width = shape.grid
    padded = _up(width, 8)
    natural = width if _chunk_rows(height, width, 0) * width <= MAX_CHUNK_KEYS else padded
    # Padded rows cost what two strips gain, so they are for where no ring of two chunks fits; not
    # with dropout, which numbers weights by their places: the same in every kernel.
    padded_chunks = [] if shape.has_dropout else [(48, padded)]
    chunks = [(112, natural), (48, natural)]
    large = [(MAX_CHUNK_KEYS, natural, 3)]
    rings = large + [(*chunk, 2) for chunk in chunks]
    padded_rings = [(*chunk, 2) for chunk in padded_chunks]
    last_rings = [(*chunk, 1) for chunk in chunks + padded_chunks]
    num_strips = _num_strips(shape)

    def places(warps: int, strips: int) -> int:
        """Of strips, in the rounds that an image takes."""
        return -(-num_strips // (warps * strips)) * warps * strips

    roomy = [*large, (112, natural, 3)]
    max_strips = 2 if shape.head_dim <= 64 and not is_keys else 1
    has_registers = max_strips == 1 and shape.head_dim <= (64 if is_keys else 80)
    many_warps = has_registers and places(11, 1) // 11 < places(8, 1) // 8
    keys_alone = is_keys and not (shape.rpe_q.row_classes or shape.rpe_v.row_classes)
    values_in_shared = keys_alone and shape.head_dim in (32, 64)
    if values_in_shared:
        many_warps = many_warps and places(11, 1) < places(8, 2)
    for strips, warps, choices in (
        *([(1, 11, roomy)] if many_warps else []),
        *([(2, 8, roomy)] if values_in_shared else []),
        *((n, 8, each) for each in (rings, padded_rings) for n in (max_strips, 1)),
        *((1, warps, last_rings) for warps in (8, 4)),
    ):
        for chunk_keys, ring_width, stages in choices:
            for prefetch_q in (True,) if stages == 3 else (True, False):
                yield Plan(warps, strips, stages, prefetch_q, chunk_keys, ring_width)


def _num_strips(shape: Shape) -> int:
    """Of an image: pairs of groups of 8 tokens of one grid column, whose free rows prefix tokens
    take, or groups of their own."""
    height, width = shape.grid
    in_column = -(-height // 8)
    free = width * (in_column * 8 - height)
    return -(-(width * in_column + -(-max(0, shape.num_prefix - free) // 8)) // 2)


# ---- shared memory; the kernels assert that they count the same ----


def forward_bytes(shape: Shape, plan: Plan) -> int:
    """Of the forward."""
    k, v, pitch = shape.rpe_k, shape.rpe_v, _pitch(shape.head_dim * 2)
    count = _ring_bytes(shape, plan, shape.rpe_q)
    if k.row_classes:
        count = _up(count + _lookup_bytes(shape, k), 16)
    if v.row_classes:
        count = _up(count + _sums_bytes(shape, v, with_table=True), 16)
        count += plan.warps * plan.strips * _bins_bytes(v)
    strips = plan.warps * plan.strips * 16
    return count + strips * ((pitch if plan.prefetch_q else 0) + _row_pitch(shape, k))


def backward_queries_bytes(shape: Shape, plan: Plan) -> int:
    """Of the backward's pass over queries."""
    k, v = shape.rpe_k, shape.rpe_v
    count = _ring_bytes(shape, plan, shape.rpe_q)
    if k.row_classes:
        count = _up(count + _lookup_bytes(shape, k), 16)
        count = _up(count + _sums_bytes(shape, k, with_table=False), 16)
    if v.row_classes:  # with the classes of keys there is a table alone
        has_table_only = shape.same_classes and not k.is_bias
        count += _table_bytes(shape, v) if has_table_only else _up(_lookup_bytes(shape, v), 16)
    rows, grad = (16 * _row_pitch(shape, rpe) for rpe in (k, v))
    if v.row_classes:
        count += plan.warps * plan.strips * _bins_bytes(k)
    else:
        grad = max(grad, _bins_bytes(k))
    return count + plan.warps * plan.strips * (rows + grad)


def backward_keys_bytes(shape: Shape, plan: Plan) -> int:
    """Of the backward's pass over keys."""
    q, pitch = shape.rpe_q, _pitch(shape.head_dim * 2)
    count = _ring_bytes(shape, plan, shape.rpe_k, shape.rpe_v, sums=2)
    if q.row_classes:
        count = _up(count + _lookup_bytes(shape, q), 16)
    values = 16 * pitch
    if q.row_classes and not q.is_bias:
        count = _up(count + _sums_bytes(shape, q, with_table=False), 16)
        values = max(values, _bins_bytes(q))
    return count + plan.warps * plan.strips * (16 * _row_pitch(shape, q) + values)


Needed = Callable[[Shape, Plan], int]


def _ring_bytes(
    shape: Shape, plan: Plan, lookup_x: Rpe, lookup_y: Rpe = NO_RPE, sums: int = 0
) -> int:
    """mbarriers, chunks of two matrices and of `sums` numbers a row, and what lookups need."""
    (height, width), pitch = shape.grid, _pitch(shape.head_dim * 2)
    row = plan.ring_width
    rows = _chunk_rows(height, row, plan.chunk_keys)
    chunks = -(-height // rows)
    last = (height - (chunks - 1) * rows) * row + shape.num_prefix
    capacity = _up(max(rows * row if chunks > 1 else 0, last), 16)
    count = _up(plan.stages * 24, 128) + plan.stages * capacity * (2 * pitch + 4 * sums)
    for rpe in (lookup_x, lookup_y):
        if rpe.row_classes:
            entries = rpe.row_classes * rpe.slots
            count += plan.stages * capacity * _pitch(entries * 2)
            constants = _up(entries * pitch + (2 * width + 6) * 4, 16)
            count = _up(count + constants + (2 * height + 7) * rpe.slots * 2, 16)
    return count


def _lookup_bytes(shape: Shape, rpe: Rpe) -> int:
    """Table by class and slot, offsets of row classes, one-hots of column classes."""
    height, width = shape.grid
    table = (rpe.row_classes + 1) * rpe.slots * 2 if rpe.is_bias else _table_bytes(shape, rpe)
    return _up(table + (2 * height + 1) * 4, 16) + (2 * width + 13) * rpe.slots * 2


def _table_bytes(shape: Shape, rpe: Rpe) -> int:
    """A table by class and slot, of a multiple of 16 rows."""
    return _up(rpe.row_classes * rpe.slots, 16) * _pitch(shape.head_dim * 2)


def _sums_bytes(shape: Shape, rpe: Rpe, with_table: bool) -> int:
    """The same of bucket sums, with a table if any."""
    height, width = shape.grid
    table = _table_bytes(shape, rpe) if with_table else 0
    return _up(table + (2 * height + 7) * 4, 16) + (2 * width + 12) * (rpe.slots * 4 + 16)


def _bins_bytes(rpe: Rpe) -> int:
    """Bucket sums of a strip."""
    return rpe.row_classes * rpe.slots // 8 * (256 if rpe.runs else 512)


def _row_pitch(shape: Shape, rpe: Rpe) -> int:
    """Of a place that holds a query or its W."""
    own = 0 if rpe.is_bias else _pitch(rpe.row_classes * rpe.slots * 2)
    return max(_pitch(shape.head_dim * 2), own)


def _pitch(row_bytes: int) -> int:
    return row_bytes if row_bytes // 16 % 2 else row_bytes + 16


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _chunk_places(shape: Shape, plan: Plan) -> int:
    return _chunk_rows(shape.grid[0], plan.ring_width, plan.chunk_keys) * plan.ring_width


def _chunk_rows(height: int, width: int, target: int) -> int:
    """Grid rows of a chunk: an even number, of a multiple of 16 places, unless one holds all."""
    step = next(rows for rows in range(2, 18, 2) if rows * width % 16 == 0)
    return min(height, step * max(1, target // (step * width)))
