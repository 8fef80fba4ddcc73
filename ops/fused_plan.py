"""What the kernels of csrc/fused are compiled for, and how they are divided up."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from irpe_ds.ops.factors import Factors

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

    @classmethod
    def of(cls, factors: Factors, num_prefix: int, is_bias: bool) -> "Rpe":
        """Raises ValueError where the column classes need more than 16 slots."""
        _, rows, columns = factors.buckets.shape
        needed = columns if num_prefix else columns - 1
        if needed > MAX_SLOTS:
            raise ValueError(f"expected at most {MAX_SLOTS} column classes, got {needed}")
        return cls(rows, 8 if needed <= 8 else 16, is_bias)


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

    @property
    def ahead(self) -> int:
        """How many chunks a warp may have started to copy."""
        return max(1, self.stages // 2)


def plan(shape: Shape, shared_bytes: int, needed: "Needed") -> Plan | None:
    """The first plan that fits in a block's shared memory; None if none does.

    Two strips halve what a warp reads of keys and values, but above 64 numbers a head the
    registers hold one alone. The ring has two chunks, so that one is copied while another is used,
    more where there is room, and one where it must be.

    Args:
        needed: forward_bytes, backward_queries_bytes or backward_keys_bytes.
    """
    for plan in _candidates(2 if shape.head_dim <= 64 and needed is not backward_keys_bytes else 1):
        left = shared_bytes - needed(shape, plan)
        if left >= 0 and chunk_keys(shape, plan) <= MAX_CHUNK_KEYS:
            step = needed(shape, plan._replace(stages=plan.stages + 1)) - needed(shape, plan)
            return plan._replace(stages=min(8, plan.stages + left // step))
    return None


def no_plan_reason(shape: Shape, shared_bytes: int, needed: "Needed") -> str | None:
    """Why no plan fits; None when one does."""
    if plan(shape, shared_bytes, needed) is not None:
        return None
    grid = f"a grid of {shape.grid[0]} x {shape.grid[1]} patches"
    if min(shape.grid[0], 2) * ring_width(shape.grid) > MAX_CHUNK_KEYS:
        return f"{grid} has rows of more than {MAX_CHUNK_KEYS // 2} patches"
    return f"{grid} does not fit in {shared_bytes // 1024} KiB of shared memory"


def _candidates(max_strips: int) -> Iterator[Plan]:
    for strips, warps, stages in ((max_strips, 8, 2), (1, 8, 2), (1, 8, 1), (1, 4, 1)):
        for chunk_keys in (112, 48):
            for prefetch_q in (True, False):
                yield Plan(warps, strips, stages, prefetch_q, chunk_keys)


# ---- shared memory; the kernels assert that they count the same ----


def forward_bytes(shape: Shape, plan: Plan) -> int:
    """Of the forward."""
    k, v, pitch = shape.rpe_k, shape.rpe_v, _pitch(shape.head_dim * 2)
    count = _ring_bytes(shape, plan, shape.rpe_q)
    if k.row_classes:
        count = _up(count + _lookup_bytes(shape, k), 16)
    if v.row_classes:
        count = _up(count + _sums_bytes(shape, v, with_table=True), 16)
        count += _bins_bytes(plan, v)
    strips = plan.warps * plan.strips * 16
    return count + strips * ((pitch if plan.prefetch_q else 0) + _row_pitch(shape, k))


def backward_queries_bytes(shape: Shape, plan: Plan) -> int:
    """Of the backward's pass over queries."""
    k, v = shape.rpe_k, shape.rpe_v
    count = _ring_bytes(shape, plan, shape.rpe_q)
    if k.row_classes:
        count = _up(count + _lookup_bytes(shape, k), 16)
        count = _up(count + _sums_bytes(shape, k, with_table=not k.is_bias), 16)
    if v.row_classes:
        count = _up(count + _lookup_bytes(shape, v), 16)
        count = _up(count + _sums_bytes(shape, v, with_table=False), 16)
    count += sum(_bins_bytes(plan, rpe) for rpe in (k, v))
    return count + plan.warps * plan.strips * 16 * (_row_pitch(shape, k) + _row_pitch(shape, v))


def backward_keys_bytes(shape: Shape, plan: Plan) -> int:
    """Of the backward's pass over keys."""
    q, pitch = shape.rpe_q, _pitch(shape.head_dim * 2)
    count = _ring_bytes(shape, plan, shape.rpe_k, shape.rpe_v, sums=2)
    if q.row_classes:
        count = _up(count + _lookup_bytes(shape, q), 16)
    if q.row_classes and not q.is_bias:
        count = _up(count + _sums_bytes(shape, q, with_table=True), 16) + _bins_bytes(plan, q)
    return count + plan.warps * plan.strips * 16 * (_row_pitch(shape, q) + pitch)


Needed = Callable[[Shape, Plan], int]


def _ring_bytes(
    shape: Shape, plan: Plan, lookup_x: Rpe, lookup_y: Rpe = NO_RPE, sums: int = 0
) -> int:
    """mbarriers, chunks of two matrices and of `sums` numbers a row, and what lookups need."""
    (height, width), pitch = shape.grid, _pitch(shape.head_dim * 2)
    row = ring_width(shape.grid)
    rows = _chunk_rows(height, row, plan.chunk_keys)
    chunks = -(-height // rows)
    last = (height - (chunks - 1) * rows) * row + shape.num_prefix
    capacity = _up(max(rows * row if chunks > 1 else 0, last), 16)
    count = _up(plan.stages * 24, 128) + plan.stages * capacity * (2 * pitch + 4 * sums)
    for rpe in (lookup_x, lookup_y):
        if rpe.row_classes:
            entries = rpe.row_classes * rpe.slots
            count += plan.stages * capacity * _pitch(entries * 2)
            constants = _up(entries * pitch + (2 * width - 1) * 4, 16)
            count = _up(count + constants + 2 * height * rpe.slots * 2, 16)
    return count


def _lookup_bytes(shape: Shape, rpe: Rpe) -> int:
    """Table by class and slot, offsets of row classes, one-hots of column classes."""
    (height, width), entries = shape.grid, rpe.row_classes * rpe.slots
    table = (entries + rpe.slots) * 2 if rpe.is_bias else entries * _pitch(shape.head_dim * 2)
    return _up(table + (2 * height + 1) * 4, 16) + (2 * width + 13) * rpe.slots * 2


def _sums_bytes(shape: Shape, rpe: Rpe, with_table: bool) -> int:
    """The same of bucket sums, with a table of a multiple of 16 rows if any."""
    height, width = shape.grid
    table = _up(rpe.row_classes * rpe.slots, 16) * _pitch(shape.head_dim * 2) if with_table else 0
    return _up(table + (2 * height - 1) * 4, 16) + (2 * width + 29) * (rpe.slots * 4 + 16)


def _bins_bytes(plan: Plan, rpe: Rpe) -> int:
    return plan.warps * plan.strips * rpe.row_classes * rpe.slots // 8 * 512


def _row_pitch(shape: Shape, rpe: Rpe) -> int:
    """Of a place that holds a query or its W."""
    own = 0 if rpe.is_bias else _pitch(rpe.row_classes * rpe.slots * 2)
    return max(_pitch(shape.head_dim * 2), own)


def _pitch(row_bytes: int) -> int:
    return row_bytes if row_bytes // 16 % 2 else row_bytes + 16


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def ring_width(grid: tuple[int, int]) -> int:
    """Places of a grid row in the ring: padded where its width makes no chunks of whole tiles."""
    height, width = grid
    return width if _chunk_rows(height, width, 0) * width <= MAX_CHUNK_KEYS else _up(width, 8)


def chunk_keys(shape: Shape, plan: Plan) -> int:
    """Places for patches in a chunk."""
    row = ring_width(shape.grid)
    return _chunk_rows(shape.grid[0], row, plan.chunk_keys) * row


def _chunk_rows(height: int, width: int, target: int) -> int:
    """Grid rows of a chunk: an even number, of a multiple of 16 places, unless one holds all."""
    step = next(rows for rows in range(2, 18, 2) if rows * width % 16 == 0)
    return min(height, step * max(1, target // (step * width)))
