"""CUDA kernels compiled for the host, and AddressSanitizer around them."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

KERNELS = Path(__file__).parent
CSRC = KERNELS.parents[2] / "ops" / "csrc"
SANITIZED = "IRPE_TEST_SANITIZER" in os.environ
INCLUDES = [f"-I{CSRC}", f"-I{KERNELS}"]  # the latter for on_host.h
GXX = ["g++", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *INCLUDES]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OPTIONS = ["-O1", *(SANITIZERS if SANITIZED else [])]


class Host:
    """The library of compiled kernels."""

    def __init__(self, library: Path) -> None:
        self.functions = ctypes.CDLL(str(library))

    def same_bits_in_both_orders(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What run() gives; its threads run first to last, and last to first."""
        results = []
        for reverse in (0, 1):
            self.functions.reverse_threads(reverse)
            results.append(run())
        self.functions.reverse_threads(0)
        first, second = results
        for name in first:
            assert not first[name].isnan().any(), f"{name}: something was not written"
            assert torch.equal(first[name], second[name]), f"{name}: the order of the threads shows"
        return first


def build_attention(folder: Path) -> Path:
    """The fused attention as operators of CPU tensors: the kernels, and the binding as it is."""
    kernels, binding, library = (folder / name for name in ("k.o", "b.o", "attention.so"))
    compile_kernels = [
        *GXX,
        "-std=c++17",
        *OPTIONS,
        "-c",
        str(KERNELS / "attention.cpp"),
        "-o",
        str(kernels),
    ]
    includes = [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    source = [*includes, "-std=c++20", "-DIRPE_ON_HOST", "-c", str(CSRC / "cuda" / "attention.cpp")]
    compile_binding = [*GXX, "-O1", *source, "-o", str(binding)]
    for command in (compile_kernels, compile_binding):
        subprocess.run(command, check=True)
    torch_library = f"-L{Path(torch.__file__).parent / 'lib'}"
    link = ["g++", "-shared", *OPTIONS, str(kernels), str(binding), torch_library]
    subprocess.run([*link, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)
    return library
