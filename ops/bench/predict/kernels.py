"""Predicts the kernels of csrc/fused."""

import numpy as np
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import fused_kernels, fused_op
from irpe_ds.ops.bench.predict.cycles import simulate
from irpe_ds.ops.bench.predict.gpus import GPU, KIB, L2_RESIDENT
from irpe_ds.ops.bench.predict.prediction import Counts, Prediction, Problem, prediction
from irpe_ds.ops.bench.predict.sass.cubin import program
from irpe_ds.ops.bench.predict.sass.emulator import Emulator, Launch
from irpe_ds.ops.bench.predict.sass.lanes import Memory
from irpe_ds.ops.build import nvrtc
from irpe_ds.ops.fused_kernels import LOG2_E, Matrix, Params, Table
from irpe_ds.ops.fused_plan import Shape
from irpe_ds.ops.inputs import TermSpec

MATRICES = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
MATRICES_MOVED = {"forward": 4, "backward_queries": 6, "backward_keys": 6}
"""How many of the size of q each kernel reads or writes."""


def predict(kernel: str, problem: Problem, gpu: GPU) -> Prediction:
    """The kernel, compiled for this GPU.

    A block takes one image after the other, and all blocks run at the same time. So the time is
    that of a few images, and of the others as many times what an image takes in the steady state.

    Raises:
        Unavailable: there is no NVRTC, nvdisasm or C++ compiler.
        ConfigError: no plan fits the GPU.
    """
    try:
        shape = _shape(kernel, problem)
        plan, defines = fused_kernels.compile_options(kernel, shape, gpu.block_bytes)
    except ValueError as error:
        raise ConfigError(f"{kernel} cannot run on {gpu.name}: {error}") from None
    source = fused_kernels.SOURCES / f"{kernel}.cu"
    cubin = nvrtc.compile_kernel(source, defines, gpu.architecture)
    code = program(cubin, f"attention_{kernel}")
    hardware = gpu.hardware(defines["SHARED_BYTES"] + KIB)
    few, more = _images(problem)
    memory, counts, runs = _memory(kernel, problem), [], []
    for images in (few, more):
        params = bytes(_params(kernel, problem, shape, images))
        launch = Launch(params, plan.warps * 32, (problem.heads, 1, 1), ((0, 0, 0),), memory)
        traces = Emulator(code, launch).run()
        counts.append(Counts.of(code, traces))
        runs.append(simulate(code, traces, hardware, warps=plan.warps, repeat=1, resident=1))
    steady, heads = runs[1].since(runs[0]), more - few
    groups = fused_kernels.images_at_a_time(problem.batch, problem.heads, gpu.num_sms)
    rounds = -(-problem.batch // groups)
    cycles = runs[0].cycles + (rounds - few) * steady.cycles / heads
    us = max(gpu.microseconds(cycles), gpu.microseconds_of(_bytes(kernel, problem, shape)))
    return prediction(us, counts[1].since(counts[0]).over(heads), steady, heads)


def _images(problem: Problem) -> tuple[int, int]:
    """Numbers of images whose difference is the steady state. Warps take turns at the items of an
    image, so it takes as many images as warps until all of them have had the same; with many items
    it matters less who has one more."""
    return (4, 12) if problem.tokens < 400 else (2, 4)


def _terms(problem: Problem) -> tuple[TermSpec, ...]:
    skip = problem.prefix_tokens
    return tuple(TermSpec(x, "product", problem.grid, skip, 1.9, False) for x in problem.on)


def _shape(kernel: str, problem: Problem) -> Shape:
    grid, terms, keys = (
        (*problem.grid, problem.prefix_tokens),
        _terms(problem),
        kernel == "backward_keys",
    )
    return fused_op.shape(grid, terms, torch.bfloat16, problem.head_dim, keys=keys)


def _bytes(kernel: str, problem: Problem, shape: Shape) -> int:
    """That a kernel moves at least: matrices, and the bucket sums of a backward."""
    summed = {
        "forward": (shape.rpe_v,),
        "backward_queries": (shape.rpe_k,),
        "backward_keys": (shape.rpe_q,),
    }
    entries = sum(rpe.row_classes * rpe.slots for rpe in summed[kernel])
    sums = problem.batch * problem.heads * problem.tokens * entries * 2
    return MATRICES_MOVED[kernel] * problem.matrix_bytes + sums


def _params(kernel: str, problem: Problem, shape: Shape, images: int) -> Params:
    """Those of a launch for so many images; addresses that lie far apart stand for tensors."""
    heads, length, dim = problem.heads, problem.tokens, problem.head_dim
    scale = dim**-0.5
    params = Params(B=images, H=heads, softmax_scale=scale, softmax_scale_log2=scale * LOG2_E)
    params.dropout_scale = 1.0
    for n, name in enumerate(MATRICES):
        at = 0x100000000 + n * 0x40000000
        setattr(params, name, Matrix(at, heads * length * dim, dim, heads * dim))
    for n, name in enumerate(("lse", "delta", "sums_q", "sums_k", "sums_v")):
        setattr(params, name, 0x1000000000 + n * 0x40000000)
    for n, target in enumerate("qkv"):
        rpe = getattr(shape, f"rpe_{target}")
        if rpe.row_classes:
            stride = rpe.row_classes * rpe.slots * dim
            at = 0x1200000000 + n * 0x10000000
            setattr(params, f"rpe_{target}", Table(at, stride, *_class_addresses(n)))
    return params


def _class_addresses(term: int) -> tuple[int, int]:
    """Of the classes of rows and of columns."""
    return L2_RESIDENT[0] + term * 0x10000000, L2_RESIDENT[0] + term * 0x10000000 + 0x1000


def _memory(kernel: str, problem: Problem) -> Memory:
    """The classes, which decide what is looked up where."""
    memory = {}
    roles = fused_op.roles(_terms(problem), keys=kernel == "backward_keys")
    for n, target in enumerate("qkv"):
        if target in roles:
            _, *classes = roles[target].factors(torch.device("cpu"))
            for at, each in zip(_class_addresses(n), classes, strict=True):
                memory[at] = np.pad(each.numpy(), (0, 64))
    return memory
