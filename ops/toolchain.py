"""Compilers for the operators: what is installed here, and what is missing, in one line.

The CUDA compiler may be the system's or the one of the nvidia wheels, extra `irpe-ds[cuda]`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from irpe_ds.ops.library import Unavailable

ARCHITECTURES = "8.0;9.0+PTX"
"""TORCH_CUDA_ARCH_LIST unless it is set: every GPU from Ampere on, whatever machine compiles."""


def architectures() -> str:
    """The GPU architectures that are compiled for, as TORCH_CUDA_ARCH_LIST writes them."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES


def cache() -> Path:
    """Where just-in-time builds lie, one folder for each version of Python and PyTorch."""
    from torch.utils.cpp_extension import get_default_build_root  # imports for seconds

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    python = "py{}{}".format(*sys.version_info)
    return Path(root) / f"irpe_{python}_torch{torch.__version__}"


class CUDAToolkit(NamedTuple):
    """A CUDA compiler that fits PyTorch."""

    home: Path
    """The folder with bin/nvcc and include/."""
    version: str
    """Of the compiler, such as 13.0."""
    runtime: Path
    """The library libcudart.so, perhaps with a version in its name."""


def cxx() -> str:
    """The C++ compiler: CXX, else c++.

    Raises:
        Unavailable: it is not installed.
    """
    command = os.environ.get("CXX", "c++")
    if not shutil.which(command.split()[0] if command.split() else command):
        raise Unavailable(f"there is no C++ compiler {command!r}: install g++, or set CXX")
    return command


def ninja() -> str:
    """The build tool that PyTorch's just-in-time builds use, also of an inactive environment.

    Raises:
        Unavailable: it is not installed.
    """
    found = shutil.which("ninja", path=path_with_scripts())
    if found is None:
        raise Unavailable("ninja is not installed: pip install ninja")
    return found


def path_with_scripts() -> str:
    """PATH, and the folder of this Python's own scripts after it."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def cuda() -> CUDAToolkit:
    """The first CUDA compiler of PyTorch's major version: CUDA_HOME, PATH, system, wheels.

    Raises:
        Unavailable: there is none; the message names those that do not fit.
    """
    wanted = torch.version.cuda
    if wanted is None:
        raise Unavailable("PyTorch is a build without CUDA")
    refused = []
    for home in dict.fromkeys(_homes(wanted.split(".")[0])):
        try:
            return _toolkit(home, wanted)
        except Unavailable as error:
            refused.append(str(error))
    hint = f"install CUDA {wanted}, or for CUDA 13.0 pip install 'irpe-ds[cuda]'"
    raise Unavailable("; ".join([*(refused or ["there is no nvcc"]), hint]))


def _homes(major: str) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path).resolve().parents[1]
    for home in (Path("/usr/local/cuda"), *_wheels(major)):
        if (home / "bin" / "nvcc").exists():
            yield home


def _wheels(major: str) -> list[Path]:
    """Where pip puts the nvidia wheels of one major version; PyTorch depends on some of them."""
    spec = find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [Path(place) / f"cu{major}" for place in places or ()]


def _toolkit(home: Path, wanted: str) -> CUDAToolkit:
    nvcc, major = home / "bin" / "nvcc", wanted.split(".")[0]
    try:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{nvcc} does not run ({error})") from error
    release = re.search(r"release (\d+\.\d+)", printed.stdout)
    version = release[1] if release else "unknown"
    if version.split(".")[0] != major:
        raise Unavailable(f"{nvcc} is CUDA {version}, PyTorch is built for CUDA {wanted}")
    if not (home / "include" / "cuda_runtime_api.h").exists():
        raise Unavailable(f"{home} has no include/cuda_runtime_api.h")
    folders = (home / "lib64", home / "lib", *(wheel / "lib" for wheel in _wheels(major)))
    for folder in folders:
        for name in ("libcudart.so", f"libcudart.so.{major}"):
            if (folder / name).exists():
                return CUDAToolkit(home, version, folder / name)
    raise Unavailable(f"{home} has no libcudart.so")
