"""The kernels of csrc/fused: what each is compiled for, how it is divided up, and its launch."""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from irpe_ds.ops.build import nvrtc
from irpe_ds.ops.factors import Factors

SOURCES = Path(__file__).parent / "csrc" / "fused"
MAX_SLOTS = 16
LOG2_E = 1.4426950408889634


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


class Shape(NamedTuple):
    """What a model never changes."""

    dtype: torch.dtype
    head_dim: int
    grid: tuple[int, int]
    num_prefix: int
    rpe_q: Rpe = Rpe()
    """Keys own these lookups, so classes of rows and columns change places: `transposed`."""
    rpe_k: Rpe = Rpe()
    rpe_v: Rpe = Rpe()
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


def plan_forward(shape: Shape, shared_bytes: int) -> Plan | None:
    """The first plan that fits in a block's shared memory; None if none does.

    Two strips halve what a warp reads of keys and values, but above 64 numbers a head the
    registers hold one alone. The ring has two chunks, so that one is copied while another is used,
    more where there is room, and one where it must be.
    """
    for plan in _candidates(2 if shape.head_dim <= 64 else 1):
        left = shared_bytes - forward_bytes(shape, plan)
        if left >= 0:
            more = plan._replace(stages=plan.stages + 1)
            step = forward_bytes(shape, more) - forward_bytes(shape, plan)
            return plan._replace(stages=min(8, plan.stages + left // step))
    return None


def _candidates(max_strips: int) -> Iterator[Plan]:
    for strips, warps, stages in ((max_strips, 8, 2), (1, 8, 2), (1, 8, 1), (1, 4, 1)):
        for chunk_keys in (112, 48):
            for prefetch_q in (True, False):
                yield Plan(warps, strips, stages, prefetch_q, chunk_keys)


def forward_bytes(shape: Shape, plan: Plan) -> int:
    """Of shared memory; the kernel asserts that it counts the same."""
    height, width = shape.grid
    pitch = _pitch(shape.head_dim * 2)
    rows = _chunk_rows(height, width, plan.chunk_keys)
    chunks = -(-height // rows)
    last = (height - (chunks - 1) * rows) * width + shape.num_prefix
    capacity = _up(max(rows * width if chunks > 1 else 0, last), 16)
    q, k, v = shape.rpe_q, shape.rpe_k, shape.rpe_v
    count = _up(plan.stages * 24, 128) + plan.stages * 2 * capacity * pitch
    scratch = pitch
    if q.row_classes:
        entries = q.row_classes * q.slots
        count += plan.stages * capacity * _pitch(entries * 2)
        offsets = _up(entries * pitch + (2 * width - 1) * 4, 16)
        count = _up(count + offsets + 2 * height * q.slots * 2, 16)
    if k.row_classes:
        entries = k.row_classes * k.slots
        table = (k.row_classes + 1) * k.slots * 2 if k.is_bias else entries * pitch
        offsets = _up(table + (2 * height + 1) * 4, 16)
        count = _up(count + offsets + (2 * width + 13) * k.slots * 2, 16)
        if not k.is_bias:
            scratch = max(pitch, _pitch(entries * 2))
    if v.row_classes:
        table = _up(v.row_classes * v.slots, 16) * pitch
        offsets = _up(table + (2 * height - 1) * 4, 16)
        count = _up(count + offsets + (2 * width + 29) * (v.slots * 4 + 16), 16)
        count += plan.warps * plan.strips * v.row_classes * v.slots // 8 * 512
    strips = plan.warps * plan.strips * 16
    return count + (strips * pitch if plan.prefetch_q else 0) + strips * scratch


def _pitch(row_bytes: int) -> int:
    return row_bytes if row_bytes // 16 % 2 else row_bytes + 16


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _chunk_rows(height: int, width: int, target: int) -> int:
    """Grid rows of a chunk: an even number, of a multiple of 16 keys, unless one holds all."""
    step = next(rows for rows in range(2, 18, 2) if rows * width % 16 == 0)
    return min(height, step * max(1, target // (step * width)))


class Device(Protocol):
    """A GPU, or what stands in for one in the tests."""

    architecture: str
    num_sms: int
    shared_bytes: int
    """That a block can have."""
    driver: ctypes.CDLL
    """libcuda, or its stand-in."""

    def __hash__(self) -> int: ...

    def stream(self) -> int | None:
        """The handle of the stream that kernels are launched on."""


class CudaDevice:
    """A GPU of this process."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self.num_sms = properties.multi_processor_count
        self.shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self.driver = ctypes.CDLL("libcuda.so.1")

    def stream(self) -> int | None:
        return torch.cuda.current_stream(self.index).cuda_stream or None


@functools.cache
def device_of(index: int) -> Device:
    """The GPU with this number."""
    return CudaDevice(index)


class Matrix(ctypes.Structure):
    """(B, H, L, D), the D numbers of a row next to each other."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride_b", ctypes.c_int32),
        ("stride_h", ctypes.c_int32),
        ("stride_l", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor) -> "Matrix":
        return cls(x.data_ptr(), *x.stride()[:3])


class Table(ctypes.Structure):
    """A table by class and slot, (H or 1, row classes x slots, D), and its classes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride_h", ctypes.c_int64),
        ("row_class", ctypes.c_void_p),
        ("column_class", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, rpe: "Operand | None") -> "Table":
        if rpe is None:
            return cls()
        stride = rpe.table.stride(0) if rpe.table.shape[0] > 1 else 0
        _, rows, columns = rpe.factors
        return cls(rpe.table.data_ptr(), stride, rows.data_ptr(), columns.data_ptr())


class ForwardParams(ctypes.Structure):
    """Params of csrc/fused/config.cuh."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *((name, Table) for name in ("rpe_q", "rpe_k", "rpe_v")),
        *((name, ctypes.c_void_p) for name in ("key_padding_mask", "seed")),
        *((name, ctypes.c_int32) for name in ("batch", "heads")),
        *((name, ctypes.c_float) for name in ("softmax_scale_log2", "dropout_scale")),
        ("dropout_threshold", ctypes.c_uint32),
    )


class Kernel:
    """A kernel on a device, loaded."""

    def __init__(
        self, name: str, defines: dict[str, int], device: Device, threads: int, shared_bytes: int
    ) -> None:
        self.name, self.device, self.threads, self.shared_bytes = (
            name,
            device,
            threads,
            shared_bytes,
        )
        source = SOURCES / f"{name}.cu"
        binary = nvrtc.compile_kernel(source, defines, device.architecture)
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), binary)
        entry = f"attention_{name}".encode()
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, entry)
        max_dynamic_shared_size = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        attribute = (self._function, max_dynamic_shared_size, shared_bytes)
        self._call("cuFuncSetAttribute", *attribute)

    def launch(self, blocks: int, params: ctypes.Structure) -> None:
        """Start it on the current stream."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        sizes = (blocks, 1, 1, self.threads, 1, 1, self.shared_bytes)
        stream = ctypes.c_void_p(self.device.stream())
        self._call("cuLaunchKernel", self._function, *sizes, stream, arguments, None)

    def _call(self, function: str, *arguments: object) -> None:
        error = getattr(self.device.driver, function)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self.device.driver.cuGetErrorString(error, ctypes.byref(text))
            said = (text.value or b"").decode(errors="replace")
            raise RuntimeError(f"{function} of attention_{self.name}: error {error} {said}".strip())


@functools.cache
def forward_kernel(shape: Shape, device: Device) -> Kernel:
    """The forward for this shape, compiled on the first call.

    Raises:
        ValueError: no plan fits in the shared memory of this device.
    """
    plan = plan_forward(shape, device.shared_bytes)
    if plan is None:
        raise ValueError(f"{shape} does not fit in {device.shared_bytes} bytes of shared memory")
    q, k, v = shape.rpe_q, shape.rpe_k, shape.rpe_v
    shared_bytes = forward_bytes(shape, plan)
    defines = {
        "BFLOAT16": shape.dtype == torch.bfloat16,
        "HEAD_DIM": shape.head_dim,
        "GRID_H": shape.grid[0],
        "GRID_W": shape.grid[1],
        "NUM_PREFIX_TOKENS": shape.num_prefix,
        "KEY_PADDING_MASK": shape.has_mask,
        "DROPOUT": shape.has_dropout,
        "RPE_Q_CLASSES": q.row_classes,
        "RPE_Q_SLOTS": q.slots,
        "RPE_K_ROWS": k.row_classes,
        "RPE_K_SLOTS": k.slots,
        "RPE_K_BIAS": k.is_bias,
        "RPE_V_ROWS": v.row_classes,
        "RPE_V_SLOTS": v.slots,
        "WARPS": plan.warps,
        "STRIPS": plan.strips,
        "STAGES": plan.stages,
        "AHEAD": plan.ahead,
        "STEP_TILES": 6 if plan.strips == 2 and not v.row_classes else 4,
        "PREFETCH_Q": plan.prefetch_q,
        "CHUNK_KEYS": plan.chunk_keys,
        "SHARED_BYTES": shared_bytes,
    }
    return Kernel("forward", defines, device, plan.warps * 32, shared_bytes)


def by_slot(tables: Sequence[Tensor], factors: Factors, rpe: Rpe) -> Tensor:
    """The terms' tables by class and slot, added up, as the kernels read them.

    A product with constant one-hots: exact, and its gradient is summed in a fixed order.

    Args:
        tables: (H or 1, buckets, X) for each map of `factors`.

    Returns:
        (H or 1, row classes x slots, X)
    """
    buckets, prefix = factors.buckets[:, :, :-1], factors.buckets[:, :, -1:]
    free = rpe.slots - buckets.shape[2]  # the prefix tokens' bucket comes last
    slots = torch.cat([buckets, prefix.expand(-1, -1, free)], 2).flatten(1)
    terms = [
        torch.nn.functional.one_hot(ids, table.shape[1]).to(table.dtype) @ table
        for table, ids in zip(tables, slots, strict=True)
    ]
    return torch.stack(terms).sum(0)


class Operand(NamedTuple):
    """Relative position on queries, keys or values: a table and how it is read."""

    table: Tensor
    """(H or 1, row classes x slots, D); of a bias divided by the scale, without D."""
    factors: Factors


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: Operand | None,
    rpe_k: Operand | None,
    rpe_v: Operand | None,
    *,
    shape: Shape,
    scale: float,
    device: Device,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with relative position.

    Args:
        q, k, v: (B, H, L, D); rows of D numbers next to each other, at multiples of 16 bytes.
        key_padding_mask: (B, L) bool, True where a key must not be attended to; contiguous.
        seed: of the dropout, one int64. Probabilities are rounded to multiples of 2^-16.

    Returns:
        (B, H, L, D), in memory (B, L, H, D), and the log-sum-exp of the scores, (B, H, L) float32.
    """
    batch, heads, length, dim = q.shape
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    threshold = round(dropout_p * 2**16)
    params = ForwardParams(
        *(Matrix.of(x) for x in (q, k, v, out)),
        lse.data_ptr(),
        *(Table.of(rpe) for rpe in (rpe_q, rpe_k, rpe_v)),
        *(None if x is None else x.data_ptr() for x in (key_padding_mask, seed)),
        batch,
        heads,
        scale * LOG2_E,
        2**16 / (2**16 - threshold),
        threshold,
    )
    groups = max(1, min(batch, device.num_sms // heads))
    if q.numel():
        forward_kernel(shape, device).launch(heads * groups, params)
    return out, lse
