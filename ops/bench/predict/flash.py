"""Predicts PyTorch's FlashAttention-2, whose kernels come out of libtorch_cuda.so.

Names, tiles and parameters are those of csrc/flash_attn/src/ of Dao-AILab/flash-attention:
flash.h, kernel_traits.h, flash_fwd_launch_template.h and flash_bwd_launch_template.h.
"""

import ctypes
import functools
import mmap
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from irpe_ds.ops.bench.predict.cycles import simulate
from irpe_ds.ops.bench.predict.gpus import GPU, KIB
from irpe_ds.ops.bench.predict.prediction import Counts, Prediction, Problem, prediction
from irpe_ds.ops.bench.predict.sass.cubin import FILE, Elf, program, tool
from irpe_ds.ops.bench.predict.sass.emulator import Emulator, Launch
from irpe_ds.ops.build.toolchain import Unavailable
from irpe_ds.ops.fused_kernels import LOG2_E

REPEATS = 3, 7
"""How often the blocks of a head pass, so that the difference is the steady state."""
MOST_BLOCKS = 4
"""Of a head that are followed where all of them do the same."""
BYTES_SHARE = 0.85
"""Of the rate of device memory that kernels reach which only move bytes."""


class Tile(NamedTuple):
    """How a kernel is divided up."""

    dim: int
    """The head dimension that it is compiled for; a smaller one is padded to it."""
    queries: int
    keys: int
    warps: int
    shared_bytes: int
    blocks_over_queries: bool
    """Whether a block has so many queries and passes over the keys, or the other way round."""

    @property
    def mangled(self) -> str:
        """What the name of its kernel contains."""
        return "".join(f"Li{n}E" for n in (self.dim, self.queries, self.keys, self.warps))


def padded(head_dim: int) -> int:
    """The head dimension that there is a kernel for."""
    return next(dim for dim in (32, 64, 96, 128) if dim >= head_dim)


def forward_tile(head_dim: int, gpu: GPU) -> Tile:
    dim = padded(head_dim)
    keys = 128 if dim <= 64 else 64
    if dim == 128 and gpu.architecture not in ("sm_80", "sm_90"):
        keys = 32
    return Tile(dim, 128, keys, 4, (128 + 2 * keys) * dim * 2, True)


def backward_tile(head_dim: int, gpu: GPU) -> Tile:
    """Values are kept in registers where shared memory is short."""
    dim = padded(head_dim)
    fits = gpu.block_bytes >= 144 * KIB
    queries, keys, values_in_registers = {
        32: (128, 128, True),
        64: (128, 128, False) if fits else (64, 128, True),
        96: (64, 128, True),
        128: (64, 128, False) if fits else (64, 64, True),
    }[dim]
    of_keys, of_scores = keys * dim * 2, queries * keys * 2
    if values_in_registers:
        rest = max(2 * of_keys, of_keys + 2 * of_scores)
    else:
        rest = 2 * of_keys + 2 * of_scores
    return Tile(dim, queries, keys, 8, 3 * queries * dim * 2 + rest, False)


class Forward(ctypes.Structure):
    """Flash_fwd_params, padding included; what is left out here is zero."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("q", "k", "v")),
        *((f"{x}_stride_{y}", ctypes.c_int64) for y in ("b", "l", "h") for x in "qkv"),
        *((name, ctypes.c_int32) for name in ("h", "h_k", "h_h_k_ratio")),
        *((name, ctypes.c_uint64) for name in ("out", "out_accumulated")),
        *((f"out_stride_{y}", ctypes.c_int64) for y in ("b", "l", "h")),
        *((name, ctypes.c_uint64) for name in ("weights", "lse", "lse_accumulated")),
        *((name, ctypes.c_int32) for name in ("b", "length_q", "length_k", "length_new", "d")),
        *((name, ctypes.c_int32) for name in ("rounded_q", "rounded_k", "rounded_d")),
        *((name, ctypes.c_int32) for name in ("rotary_dim", "total_q")),
        *((name, ctypes.c_float) for name in ("scale", "scale_log2")),
        ("paging", ctypes.c_uint8 * 148),
        ("keep", ctypes.c_float),
        ("keep_byte", ctypes.c_uint8),
        *((name, ctypes.c_float) for name in ("keep_reciprocal", "scale_keep_reciprocal")),
        *((name, ctypes.c_int32) for name in ("window_left", "window_right")),
        ("rest", ctypes.c_uint8 * 72),
    )


class Backward(ctypes.Structure):
    """Flash_bwd_params."""

    _fields_ = (
        ("forward", Forward),
        *((name, ctypes.c_uint64) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        *((f"grad_{x}_accumulated", ctypes.c_uint64) for x in "qkv"),
        *((f"grad_out_stride_{y}", ctypes.c_int64) for y in ("b", "l", "h")),
        *((f"grad_{x}_stride_{y}", ctypes.c_int64) for y in ("b", "l", "h") for x in "qkv"),
        ("delta", ctypes.c_uint64),
        ("deterministic", ctypes.c_bool),
        ("split_stride", ctypes.c_int64),
    )


def forward(problem: Problem, gpu: GPU) -> Prediction:
    """Plain attention: relative position is left out.

    Raises:
        Unavailable: this PyTorch has no such kernels, or a tool is missing.
    """
    name = r"flash_fwd_kernel.*{tile}.*ELb0ELb0ELb0ELb0E{even}Lb0ELb0EEE"
    tile = forward_tile(problem.head_dim, gpu)
    found = _predict("fwd", name, tile, bytes(_forward_params(problem)), problem, gpu)
    floor = gpu.microseconds_of(4 * problem.matrix_bytes)
    return found._replace(microseconds=max(found.microseconds, floor))


def backward(problem: Problem, gpu: GPU) -> Prediction:
    """The same of its backward, with the kernels before and after it, dot_do_o and convert_dq."""
    name = r"loop_seqk_parallel_kernel.*{tile}.*ELb0ELb0ELb0ELb0E{even}Lb0EEE"
    tile = backward_tile(problem.head_dim, gpu)
    found = _predict("bwd", name, tile, bytes(_backward_params(problem)), problem, gpu)
    floor = gpu.microseconds_of(7 * problem.matrix_bytes)
    us = max(found.microseconds, floor) + before_and_after(problem, gpu)
    return found._replace(microseconds=us)


def before_and_after(problem: Problem, gpu: GPU) -> float:
    """Microseconds: dot_do_o reads output and its gradient and clears the float32 sums of q's
    gradient, which convert_dq reads, and writes that gradient."""
    length, dim = -(-problem.tokens // 128) * 128, padded(problem.head_dim)
    sums = problem.batch * problem.heads * length * dim * 4
    return gpu.microseconds_of(3 * problem.matrix_bytes + 2 * sums) / BYTES_SHARE


def _predict(
    side: str, name: str, tile: Tile, params: bytes, problem: Problem, gpu: GPU
) -> Prediction:
    divided = tile.queries if tile.blocks_over_queries else tile.keys
    even_dim = problem.head_dim == tile.dim
    even = problem.tokens % tile.queries == 0 == problem.tokens % tile.keys and even_dim
    name = name.format(tile=tile.mangled, even=f"Lb{even:d}ELb{even_dim:d}E")
    code = program(_cubin(side, tile.dim, gpu.architecture), name)
    blocks, threads = -(-problem.tokens // divided), tile.warps * 32
    grid = blocks, problem.batch, problem.heads
    followed = min(blocks, MOST_BLOCKS) if even else blocks
    launch = Launch(params, threads, grid, tuple((n, 3, 2) for n in range(followed)), {})
    traces = Emulator(code, launch).run()
    resident = gpu.resident(tile.shared_bytes, threads, code.registers)
    hardware = gpu.hardware(resident * (tile.shared_bytes + KIB))
    runs = [
        simulate(code, traces, hardware, warps=tile.warps, repeat=repeat, resident=resident)
        for repeat in REPEATS
    ]
    steady, heads = runs[1].since(runs[0]), (REPEATS[1] - REPEATS[0]) * followed / blocks
    of_each = problem.batch * problem.heads / gpu.num_sms
    us = gpu.microseconds(steady.cycles / heads * of_each)
    counts = Counts.of(code, traces).over(followed / blocks)
    return prediction(us, counts, steady, heads)


def _forward_params(problem: Problem) -> Forward:
    """Addresses that lie far apart stand for tensors."""
    heads, length, dim = problem.heads, problem.tokens, problem.head_dim
    rounded, tensor = -(-length // 128) * 128, 0x40000000
    strides = {"b": length * heads * dim, "l": heads * dim, "h": dim}
    scale = dim**-0.5
    p = Forward(h=heads, h_k=heads, h_h_k_ratio=1, lse=0x1000000000, b=problem.batch)
    for n, name in enumerate(("q", "k", "v", "out")):
        setattr(p, name, 0x100000000 + n * tensor)
        for place, stride in strides.items():
            setattr(p, f"{name}_stride_{place}", stride)
    p.length_q = p.length_k = length
    p.rounded_q = p.rounded_k = rounded
    p.d, p.rounded_d, p.total_q = dim, padded(dim), problem.batch * length
    p.scale, p.scale_log2 = scale, scale * LOG2_E
    p.keep, p.keep_byte, p.keep_reciprocal, p.scale_keep_reciprocal = 1.0, 255, 1.0, scale
    p.window_left = p.window_right = -1
    return p


def _backward_params(problem: Problem) -> Backward:
    p = Backward(_forward_params(problem), delta=0x1100000000)
    p.grad_q_accumulated = 0x1400000000
    for n, name in enumerate(("grad_out", "grad_q", "grad_k", "grad_v")):
        setattr(p, name, 0x200000000 + n * 0x40000000)
        for place in "blh":
            setattr(p, f"{name}_stride_{place}", getattr(p.forward, f"q_stride_{place}"))
    return p


@functools.cache
def _cubin(side: str, dim: int, architecture: str) -> bytes:
    """The machine code of PyTorch for a GPU, out of the fat binary of one of its source files."""
    with tempfile.TemporaryDirectory() as folder:
        fat = Path(folder) / "flash.fatbin"
        fat.write_bytes(fat_binary(rf"flash_{side}_hdim{dim}_bf16_sm80\."))

        def dump(*options: str) -> str:
            command = [tool("cuobjdump"), *options, fat.name]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            return done.stdout

        names = {int(n): name for name, n in re.findall(r"(\S+\.sm_(\d+)\.cubin)", dump("-lelf"))}
        wanted = int(architecture.removeprefix("sm_"))
        usable = [n for n in names if n // 10 == wanted // 10 and n <= wanted]
        if not usable:
            raise Unavailable(f"this PyTorch has no flash kernels for {architecture}")
        dump("-xelf", names[max(usable)])
        return (Path(folder) / names[max(usable)]).read_bytes()


def fat_binary(file_pattern: str) -> bytes:
    """The fat binary that follows, among the symbols, the one of this source file."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        raise Unavailable("this PyTorch is built without CUDA")
    with library.open("rb") as opened:
        elf = Elf(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    symbols, names = elf.symbols()
    is_ours = False
    for n in range(len(symbols)):
        if symbols["info"][n] & 15 == FILE:
            is_ours = re.search(file_pattern, elf.text(names + int(symbols["name"][n]))) is not None
        elif is_ours and elf.text(names + int(symbols["name"][n])) == "fatbinData":
            section = elf.sections[int(symbols["section"][n])]
            at = int(symbols["value"][n]) - section.address + section.offset
            _, _, header, size = struct.unpack_from("<IHHQ", elf.data, at)
            return elf.data[at : at + header + size]
    raise Unavailable(f"this PyTorch has no kernels of {file_pattern}")
