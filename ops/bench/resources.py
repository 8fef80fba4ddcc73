"""What the CUDA kernels take of a GPU: `python -m irpe_ds.ops.bench.resources`.

Registers, stack and spills of every kernel for every architecture, and how the fused passes divide
DeiT's attention into blocks. No GPU is needed.
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
"""Multiprocessors, and bytes of shared memory of one and of a block."""
WARPS = 64
"""That a multiprocessor holds at most."""


class Kernel(NamedTuple):
    """One kernel, compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    """Bytes of local memory for each thread, spills included."""
    spills: int
    """Bytes written and read again."""


class Layout(NamedTuple):
    """How one pass is launched."""

    warps: int
    """Of a block."""
    blocks: int
    """That a multiprocessor holds at a time."""
    shared: int
    """Bytes of shared memory of a block."""
    grid: int
    """Blocks of the launch."""


def kernels(architecture: str) -> Iterator[Kernel]:
    """Compile every .cu file and read what ptxas says.

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
        yield from _read(done.stderr)


def _read(report: str) -> Iterator[Kernel]:
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for mangled, architecture, stack, stores, loads, registers in re.findall(
        pattern, report, re.DOTALL
    ):
        found = re.search(r"\d([a-z_]+_kernel)I(.*?)EEv", mangled)
        name = _readable(*found.groups()) if found else mangled
        yield Kernel(name, architecture, int(registers), int(stack), int(stores) + int(loads))


def _readable(name: str, arguments: str) -> str:
    """`backward_kernel`, `N..4bf16ELi64ELb1` -> `backward<bf16, 64, true>`."""
    letters = {"d": "double", "f": "float"}
    values = re.findall(r"(f16|bf16)E|Li(\d+)E?|Lb([01])E?|^([df])", arguments + "E")
    texts = (
        kind or number or letters.get(letter) or ("false", "true")[int(flag)]
        for kind, number, flag, letter in values
    )
    return f"{name.removesuffix('_kernel')}<{', '.join(texts)}>"


def layouts(
    gpu: str, batch: int, heads: int, length: int, dim: int, buckets: tuple[int, int, int]
) -> list[Layout]:
    """The passes of `PASSES`, for so many buckets on queries, keys and values."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/plan"
        source = str(Path(__file__).with_name("plan.cpp"))
        compile_ = [*toolchain.cxx().split(), "-std=c++17", f"-I{toolchain.CSRC}", source]
        subprocess.run([*compile_, "-o", program], check=True, capture_output=True)
        numbers = map(str, (*GPUS[gpu], batch, heads, length, dim, *buckets))
        done = subprocess.run([program, *numbers], capture_output=True, text=True, check=True)
    return [Layout(*map(int, line.split())) for line in done.stdout.splitlines()]


def main() -> None:
    print(f"{'kernel':32} {'':6} {'registers':>9} {'stack':>6} {'spills':>6}")
    for architecture in ARCHITECTURES:
        for kernel in kernels(architecture):
            print("{:32} {:6} {:9} {:6} {:6}".format(*kernel))
    print(f"\n{'DeiT-S, B = 256':40} {'warps':>5} {'blocks':>6} {'KiB':>6} {'grid':>5} occupancy")
    for gpu in GPUS:
        for length in (197, 577, 1025):
            for on, buckets in (("K", (0, 50, 0)), ("QKV", (50, 50, 50))):
                found = layouts(gpu, 256, 6, length, 64, buckets)
                for name, at in zip(PASSES, found, strict=True):
                    title = f"{gpu}, L = {length}, {on}, {name}"
                    occupancy = at.warps * at.blocks / WARPS
                    print(
                        f"{title:40} {at.warps:5} {at.blocks:6} {at.shared / 1024:6.1f}"
                        f" {at.grid:5} {occupancy:8.0%}"
                    )


if __name__ == "__main__":
    run(main)
