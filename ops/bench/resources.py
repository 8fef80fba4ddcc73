"""GPU resources of the CUDA kernels: `python -m irpe_ds.ops.bench.resources`.

Registers, stack and spills of every kernel for every architecture, and how the fused kernels are
divided up for some models. Needs nvcc and NVRTC, no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch

from irpe_ds.cli import run
from irpe_ds.ops import fused_kernels, fused_op
from irpe_ds.ops.build import nvrtc, toolchain
from irpe_ds.ops.fused_plan import Plan
from irpe_ds.ops.inputs import TermSpec

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""That a block can have, by architecture."""
ARCHITECTURES = tuple(SHARED_BYTES)
FUSED = tuple(fused_kernels.NEEDED)
"""The kernels of csrc/fused."""


class KernelResources(NamedTuple):
    """One kernel, compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    """Bytes of local memory per thread, spills included."""
    spills: int
    """Bytes stored plus bytes loaded."""


class FusedResources(NamedTuple):
    """A kernel of csrc/fused, compiled for one model and architecture."""

    kernel: KernelResources
    plan: Plan
    shared_bytes: int
    """Of a block."""


class Model(NamedTuple):
    """Its attention: heads of 64 numbers in bfloat16, a class token, contextual product maps."""

    name: str
    grid: tuple[int, int]
    on: str
    """Where relative position is: some of q, k, v."""


DEIT_K = Model("DeiT, K", (14, 14), "k")
DEIT_QKV = Model("DeiT, QKV", (14, 14), "qkv")
DEIT_384_K = Model("DeiT at 384 pixels, K", (24, 24), "k")
MODELS = (DEIT_K, DEIT_QKV, DEIT_384_K)


def kernel_resources(architecture: str) -> Iterator[KernelResources]:
    """Those of csrc/cuda, as nvcc compiles them.

    Raises:
        Unavailable: no CUDA compiler.
        subprocess.CalledProcessError: a file does not compile.
    """
    toolkit = toolchain.cuda()
    nvcc = [str(toolkit.home / "bin" / "nvcc"), f"-I{toolkit.include}", "-std=c++17", "-O3"]
    options = [f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
    for source in sorted((toolchain.CSRC / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = [*nvcc, *options, str(source), "-o", f"{folder}/kernels.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield from _parse(done.stderr)


def fused_resources(name: str, model: Model, architecture: str) -> FusedResources:
    """Those of one of `FUSED`, as NVRTC compiles it.

    Raises:
        Unavailable: no NVRTC.
        ValueError: no plan fits.
    """
    terms = tuple(TermSpec(x, "product", model.grid, 1, 1.9, False) for x in model.on)
    keys = name == "backward_keys"
    shape = fused_op.shape((*model.grid, 1), terms, torch.bfloat16, 64, keys=keys)
    plan, defines = fused_kernels.compile_options(name, shape, SHARED_BYTES[architecture])
    source = fused_kernels.SOURCES / f"{name}.cu"
    (kernel,) = _parse(nvrtc.resource_report(source, defines, architecture))
    return FusedResources(kernel._replace(name=name), plan, defines["SHARED_BYTES"])


def _parse(report: str) -> Iterator[KernelResources]:
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for mangled, architecture, stack, stores, loads, registers in re.findall(
        pattern, report, re.DOTALL
    ):
        found = re.search(r"\d([a-z_]+_kernel)I(.*?)EEv", mangled)
        name = _readable(*found.groups()) if found else mangled
        yield KernelResources(
            name, architecture, int(registers), int(stack), int(stores) + int(loads)
        )


def _readable(name: str, arguments: str) -> str:
    """`gather_kernel`, `6__halfLb1` -> `gather<half, true>`."""
    letters = {"d": "double", "f": "float"}
    values = re.findall(r"(half|bfloat16)|Lb([01])|^([df])", arguments)
    texts = (
        kind or letters.get(letter) or ("false", "true")[int(flag)] for kind, flag, letter in values
    )
    return f"{name.removesuffix('_kernel')}<{', '.join(texts)}>"


def main() -> None:
    print(f"{'kernel':40} {'':6} {'registers':>9} {'stack':>6} {'spills':>6}", end="")
    print(f" {'warps':>6} {'strips':>6} {'stages':>6} {'chunk_keys':>10} {'shared KiB':>10}")
    row = "{:40} {:6} {:9} {:6} {:6}"
    for architecture in ARCHITECTURES:
        for kernel in kernel_resources(architecture):
            print(row.format(*kernel))
        for model in MODELS:
            for name in FUSED:
                kernel, plan, shared = fused_resources(name, model, architecture)
                print(row.format(f"{model.name}: {name}", *kernel[1:]), end="")
                print(f" {plan.warps:6} {plan.strips:6} {plan.stages:6}", end="")
                print(f" {plan.chunk_keys:10} {shared / 1024:10.1f}", flush=True)


if __name__ == "__main__":
    run(main)
