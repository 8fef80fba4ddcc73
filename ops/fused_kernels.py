"""The kernels of csrc/fused: loaded, and launched."""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from irpe_ds.ops.build import nvrtc
from irpe_ds.ops.factors import Factors
from irpe_ds.ops.fused_plan import (
    NO_RPE,
    Needed,
    Plan,
    Rpe,
    Shape,
    backward_keys_bytes,
    backward_queries_bytes,
    forward_bytes,
    no_plan_reason,
    plan,
)

SOURCES = Path(__file__).parent / "csrc" / "fused"
LOG2_E = 1.4426950408889634


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


class Params(ctypes.Structure):
    """That of csrc/fused/config.cuh."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "out")),
        *((name, Matrix) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("lse", "delta", "sums_q", "sums_k", "sums_v")),
        *((name, Table) for name in ("rpe_q", "rpe_k", "rpe_v")),
        *((name, ctypes.c_void_p) for name in ("key_padding_mask", "seed")),
        *((name, ctypes.c_int32) for name in ("B", "H")),
        *((n, ctypes.c_float) for n in ("softmax_scale", "softmax_scale_log2", "dropout_scale")),
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

    def launch(self, heads: int, images: int, params: ctypes.Structure) -> None:
        """Start a block for each head of so many images, on the current stream."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        sizes = (heads, images, 1, self.threads, 1, 1, self.shared_bytes)
        stream = ctypes.c_void_p(self.device.stream())
        self._call("cuLaunchKernel", self._function, *sizes, stream, arguments, None)

    def _call(self, function: str, *arguments: object) -> None:
        error = getattr(self.device.driver, function)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self.device.driver.cuGetErrorString(error, ctypes.byref(text))
            said = (text.value or b"").decode(errors="replace")
            raise RuntimeError(f"{function} of attention_{self.name}: error {error} {said}".strip())


NEEDED: dict[str, Needed] = {
    "forward": forward_bytes,
    "backward_queries": backward_queries_bytes,
    "backward_keys": backward_keys_bytes,
}


@functools.cache
def kernel(name: str, shape: Shape, device: Device) -> Kernel:
    """A kernel for this shape, compiled on the first call.

    Raises:
        ValueError: no plan fits this device.
    """
    chosen, defines = compile_options(name, shape, device.shared_bytes)
    return Kernel(name, defines, device, chosen.warps * 32, defines["SHARED_BYTES"])


def compile_options(name: str, shape: Shape, shared_bytes: int) -> tuple[Plan, dict[str, int]]:
    """How a kernel is divided up, and the macros that it is compiled with.

    Args:
        shared_bytes: that a block can have.

    Raises:
        ValueError: no plan fits.
    """
    chosen = plan(shape, shared_bytes, NEEDED[name])
    if chosen is None:
        raise ValueError(no_plan_reason(shape, shared_bytes, NEEDED[name]))
    q, k, v = shape.rpe_q, shape.rpe_k, shape.rpe_v
    return chosen, {
        "BFLOAT16": shape.dtype == torch.bfloat16,
        "HEAD_DIM": shape.head_dim,
        "GRID_H": shape.grid[0],
        "GRID_W": shape.grid[1],
        "RING_WIDTH": chosen.ring_width,
        "NUM_PREFIX_TOKENS": shape.num_prefix,
        "KEY_PADDING_MASK": shape.has_mask,
        "DROPOUT": shape.has_dropout,
        "RPE_Q_ROWS": q.row_classes,
        "RPE_Q_SLOTS": q.slots,
        "RPE_Q_RUNS": q.runs,
        "RPE_Q_BIAS": q.is_bias,
        "RPE_K_ROWS": k.row_classes,
        "RPE_K_SLOTS": k.slots,
        "RPE_K_RUNS": k.runs,
        "RPE_K_BIAS": k.is_bias,
        "RPE_V_ROWS": v.row_classes,
        "RPE_V_SLOTS": v.slots,
        "RPE_V_RUNS": v.runs,
        "SAME_CLASSES": shape.same_classes,
        "WARPS": chosen.warps,
        "STRIPS": chosen.strips,
        "STAGES": chosen.stages,
        "STEP_TILES": 6 if chosen.strips == 2 and not v.row_classes else 4,
        "PREFETCH_Q": chosen.prefetch_q,
        "CHUNK_KEYS": chosen.chunk_keys,
        "SHARED_BYTES": NEEDED[name](shape, chosen),
    }


class Operand(NamedTuple):
    """Relative position on queries, keys or values: a table and how it is read."""

    table: Tensor
    """(H or 1, row classes x slots, D); of a bias divided by the scale, without D."""
    factors: Factors


class Call(NamedTuple):
    """The arguments of a forward, and of its backward."""

    q: Tensor
    """(B, H, L, D), as k and v; rows of D numbers next to each other, at multiples of 16 bytes."""
    k: Tensor
    v: Tensor
    rpe_q: Operand | None
    rpe_k: Operand | None
    rpe_v: Operand | None
    shape: Shape
    scale: float
    key_padding_mask: Tensor | None = None
    """(B, L) bool, True where a key must not be attended to; contiguous."""
    dropout_p: float = 0.0
    """Rounded to a multiple of 2^-16."""
    seed: Tensor | None = None
    """Of the dropout, one int64."""

    def params(self, lse: Tensor, **matrices: Tensor) -> Params:
        threshold = min(round(self.dropout_p * 2**16), 2**16 - 1)
        params = Params(B=self.q.shape[0], H=self.q.shape[1], dropout_threshold=threshold)
        for name, x in {"q": self.q, "k": self.k, "v": self.v, **matrices}.items():
            setattr(params, name, Matrix.of(x))
        params.lse = lse.data_ptr()
        params.rpe_q, params.rpe_k, params.rpe_v = map(
            Table.of, (self.rpe_q, self.rpe_k, self.rpe_v)
        )
        params.softmax_scale, params.softmax_scale_log2 = self.scale, self.scale * LOG2_E
        params.dropout_scale = 2**16 / (2**16 - threshold)
        if self.key_padding_mask is not None:
            params.key_padding_mask = self.key_padding_mask.data_ptr()
        if self.seed is not None:
            params.seed = self.seed.data_ptr()
        return params


def forward(call: Call, device: Device, keep_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with relative position.

    Args:
        keep_sums: whether a backward follows.

    Returns:
        (B, H, L, D), in memory (B, L, H, D); the log-sum-exp of the scores, (B, H, L) float32; the
        bucket sums of the weights for the terms on values, (B, L, H, row classes x slots), without
        numbers where they are not kept.
    """
    out = empty_like_tokens(call.q)
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    sums_v = empty_sums(call.q, call.shape.rpe_v if keep_sums else NO_RPE)
    params = call.params(lse, out=out)
    params.sums_v = sums_v.data_ptr() if sums_v.numel() else None
    _launch("forward", call, device, params)
    return out, lse, sums_v


def backward_queries(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, device: Device
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward sums up for each query; `out` and `lse` are the results of `forward`.

    Returns:
        The gradient of q; delta, (B, H, L) float32, the products of grad_out and out; the bucket
        sums of the scores' gradients for the terms on keys, (B, L, H, row classes x slots).
    """
    grad_q, delta = empty_like_tokens(call.q), torch.empty_like(lse)
    sums_k = empty_sums(call.q, call.shape.rpe_k)
    params = call.params(lse, out=out, grad_out=grad_out, grad_q=grad_q)
    params.delta, params.sums_k = delta.data_ptr(), sums_k.data_ptr()
    _launch("backward_queries", call, device, params)
    return grad_q, delta, sums_k


def backward_keys(
    call: Call, lse: Tensor, delta: Tensor, grad_out: Tensor, device: Device
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward sums up for each key.

    Args:
        call: with factors on queries as they are, and those on keys and values transposed. A bias
            on keys is given in place of a term on queries, by negated offsets.
        delta: of `backward_queries`.

    Returns:
        The gradients of k and v, and the bucket sums of the scores' gradients for the terms on
        queries, (B, L, H, row classes x slots).
    """
    grad_k, grad_v = empty_like_tokens(call.q), empty_like_tokens(call.q)
    rpe = call.shape.rpe_q
    sums_q = empty_sums(call.q, NO_RPE if rpe.is_bias else rpe)
    params = call.params(lse, grad_out=grad_out, grad_k=grad_k, grad_v=grad_v)
    params.delta, params.sums_q = delta.data_ptr(), sums_q.data_ptr()
    _launch("backward_keys", call, device, params)
    return grad_k, grad_v, sums_q


def empty_like_tokens(x: Tensor) -> Tensor:
    """(B, H, L, D) in memory as (B, L, H, D): the heads of a token lie next to each other."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def empty_sums(q: Tensor, rpe: Rpe) -> Tensor:
    """For bucket sums of every token: (B, L, H, row classes x slots)."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, rpe.row_classes * rpe.slots)


def images_at_a_time(batch: int, heads: int, num_sms: int) -> int:
    """Each has a block for every head; blocks stay on their heads and go from image to image."""
    return max(1, min(batch, num_sms // heads))


def _launch(name: str, call: Call, device: Device, params: Params) -> None:
    if call.q.numel():
        images = images_at_a_time(params.B, params.H, device.num_sms)
        kernel(name, call.shape, device).launch(params.H, images, params)
