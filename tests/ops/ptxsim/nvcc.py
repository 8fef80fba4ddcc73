"""Kernels that nvcc compiles, launched on the simulator by their own host code."""

import ctypes
import os
import subprocess
from pathlib import Path

from irpe_ds.ops.build import toolchain
from tests.ops.ptxsim.simulator import Simulator, made_once

# Without code of a GPU. Uncompressed, for the simulator to find the PTX.
NVCC = ["-std=c++17", "-lineinfo", "-gencode=arch=compute_80,code=compute_80"]
NVCC += ["--no-compress", "-shared", "-cudart=none", "-Xcompiler=-fPIC"]


def compile_library(simulator: Simulator, source: Path) -> Path:
    """A .cu file as a shared library, made by the first process that asks for it."""
    library = simulator.folder / f"{source.stem}.so"

    def make(partial: Path) -> None:
        toolkit, folder = toolchain.cuda(), simulator.folder
        nvcc = [toolkit.home / "bin" / "nvcc", f"-I{toolkit.include}", *NVCC]
        link = [f"-L{folder}", "-lptxsim", f"-Xlinker=-rpath={folder}"]
        subprocess.run([*nvcc, source, *link, "-o", partial], check=True)

    made_once(library, make)
    return library


def load(library: Path) -> ctypes.CDLL:
    """Its own symbols come first, before those of the CUDA runtime that PyTorch has loaded."""
    return ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
