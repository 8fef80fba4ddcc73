"""GPU resources of the CUDA kernels: `python -m irpe_ds.ops.bench.resources`.

Registers, stack and spills of every kernel for every architecture, and the launch configurations of
the fused passes for DeiT's attention. Needs nvcc, no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from irpe_ds.cli import run
from irpe_ds.ops.build import toolchain

ARCHITECTURES = ("sm_80", "sm_90")
PASSES = ("forward", "backward, queries", "backward, keys")
GPUS = {"A100": (108, 164 * 1024, 163 * 1024), "H200": (132, 228 * 1024, 227 * 1024)}
"""Multiprocessors, and bytes of shared memory per multiprocessor and per block."""
MAX_WARPS = 64
"""Per multiprocessor."""


class KernelResources(NamedTuple):
    """One kernel, compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    """Bytes of local memory per thread, spills included."""
    spills: int
    """Bytes stored plus bytes loaded."""


class LaunchConfig(NamedTuple):
    """How one pass is launched."""

    warps: int
    """Per block."""
    blocks: int
    """Resident blocks per multiprocessor."""
    shared: int
    """Bytes of shared memory per block."""
    grid: int
    """Blocks of the launch."""


def kernel_resources(architecture: str) -> Iterator[KernelResources]:
    """Compile every .cu file and parse the report of ptxas.

    Raises:
        Unavailable: no CUDA compiler.
        subprocess.CalledProcessError: a file does not compile.
    """
    options = ["-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
    for source in sorted((toolchain.CSRC / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            report = _nvcc(*options, str(source), "-o", f"{folder}/kernels.cubin")
        yield from _parse(report)


def _nvcc(*arguments: str) -> str:
    """Compile; returns what nvcc prints."""
    toolkit = toolchain.cuda()
    nvcc = [str(toolkit.home / "bin" / "nvcc"), f"-I{toolkit.include}", "-std=c++17"]
    command = [*nvcc, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


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
    """`backward_kernel`, `N..4bf16ELi64ELb1` -> `backward<bf16, 64, true>`."""
    letters = {"d": "double", "f": "float"}
    values = re.findall(r"(f16|bf16)E|Li(\d+)E?|Lb([01])E?|^([df])", arguments + "E")
    texts = (
        kind or number or letters.get(letter) or ("false", "true")[int(flag)]
        for kind, number, flag, letter in values
    )
    return f"{name.removesuffix('_kernel')}<{', '.join(texts)}>"


def launch_configs(
    gpu: str, batch: int, heads: int, length: int, dim: int, buckets: tuple[int, int, int]
) -> list[LaunchConfig]:
    """Those of `PASSES`, given the buckets on queries, keys and values."""
    with tempfile.TemporaryDirectory() as folder:
        program, source = f"{folder}/plan", Path(__file__).with_name("plan.cu")
        cudart = toolchain.cuda().runtime
        link = ["-cudart=none", str(cudart), "-Xlinker", f"-rpath={cudart.parent}"]
        _nvcc(f"-I{toolchain.CSRC}", str(source), *link, "-o", program)
        numbers = map(str, (*GPUS[gpu], batch, heads, length, dim, *buckets))
        done = subprocess.run([program, *numbers], capture_output=True, text=True, check=True)
    return [LaunchConfig(*map(int, line.split())) for line in done.stdout.splitlines()]


def main() -> None:
    print(f"{'kernel':32} {'':6} {'registers':>9} {'stack':>6} {'spills':>6}")
    for architecture in ARCHITECTURES:
        for kernel in kernel_resources(architecture):
            print("{:32} {:6} {:9} {:6} {:6}".format(*kernel))
    print(f"\n{'DeiT-S, B = 256':40} {'warps':>5} {'blocks':>6} {'KiB':>6} {'grid':>5} occupancy")
    for gpu in GPUS:
        for length in (197, 577, 1025):
            for on, buckets in (("K", (0, 50, 0)), ("QKV", (50, 50, 50))):
                found = launch_configs(gpu, 256, 6, length, 64, buckets)
                for name, at in zip(PASSES, found, strict=True):
                    title = f"{gpu}, L = {length}, {on}, {name}"
                    occupancy = at.warps * at.blocks / MAX_WARPS
                    print(
                        f"{title:40} {at.warps:5} {at.blocks:6} {at.shared / 1024:6.1f}"
                        f" {at.grid:5} {occupancy:8.0%}"
                    )


if __name__ == "__main__":
    run(main)
