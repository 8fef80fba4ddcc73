"""Find the compilers for the operators, or say in one line what is missing.

The CUDA compiler may be the system's or the one of the nvidia wheels, extra `irpe-ds[cuda]`.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

CSRC = Path(__file__).parents[1] / "csrc"


class Unavailable(Exception):
    """The operators cannot be built or loaded here; one line says why, and what would help."""


ARCHITECTURES = "8.0;9.0+PTX"
"""The default of TORCH_CUDA_ARCH_LIST: every GPU from Ampere on, whatever GPU the builder has."""


def architectures() -> str:
    """The GPU architectures to compile for, in the format of TORCH_CUDA_ARCH_LIST.

    Raises:
        Unavailable: that variable holds something else.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for architecture in chosen:
        if not re.fullmatch(r"\d{1,2}\.\d[af]?(\+PTX)?", architecture, re.ASCII):
            expected = (
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as {ARCHITECTURES}"
            )
            raise Unavailable(f"{expected}, got {architecture[:40]!r}")
    return ";".join(chosen) or ARCHITECTURES


def gencode() -> list[str]:
    """nvcc's options for `architectures`."""
    options = []
    for architecture in architectures().split(";"):
        number = architecture.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def runs_on(capability: tuple[int, int], compiled: str) -> bool:
    """Whether kernels `compiled` for such architectures run on this compute capability."""
    for architecture in re.split(r"[;\s]+", compiled.strip()):
        number = re.match(r"(\d+)\.(\d+)", architecture)
        if number is None:
            continue
        major, minor = int(number[1]), int(number[2])
        same = capability[0] == major and capability[1] >= minor
        if same or (architecture.endswith("+PTX") and capability >= (major, minor)):
            return True
    return False


class CUDAToolkit(NamedTuple):
    """A CUDA compiler of PyTorch's CUDA version."""

    home: Path
    """The folder with bin/nvcc."""
    version: str
    """The compiler's, such as 13.0."""
    include: Path
    """The folder of cuda_runtime_api.h."""
    runtime: Path
    """The library libcudart.so, possibly with a version suffix."""


def sources() -> str:
    """A hash of the sources of this build and its compiler options."""
    key = hashlib.sha256()
    options = [Path(__file__).with_name("extension.py"), Path(__file__)]
    folders = (CSRC, CSRC / "cpu", CSRC / "cuda")
    code = sorted(path for folder in folders for path in folder.glob("*.*"))
    for source in [*code, *options]:
        key.update(source.read_bytes())
    return key.hexdigest()[:16]


def cache_root() -> Path:
    """The folder of all just-in-time builds, which PyTorch's extensions have too."""
    from torch.utils.cpp_extension import get_default_build_root  # a slow import

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(os.path.expanduser(root)).absolute()


def cache(toolkit: CUDAToolkit | None) -> Path:
    """The folder of a just-in-time build, one for each set of sources, options and versions."""
    key = hashlib.sha256(sources().encode())
    for fact in (
        sys.version_info[:2],
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability().startswith("AVX"),
        toolkit and (toolkit.version, architectures()),
        os.environ.get("CXX"),
    ):
        key.update(repr(fact).encode())
    return cache_root() / f"irpe_{key.hexdigest()[:16]}"


def cxx() -> str:
    """The C++ compiler: CXX, else c++.

    Raises:
        Unavailable: it is not installed.
    """
    command = os.environ.get("CXX", "c++")
    if not shutil.which(command.split()[0] if command.split() else command):
        raise Unavailable(f"no C++ compiler {command!r}: install g++, or set CXX")
    return command


def ninja() -> str:
    """The build tool of PyTorch's just-in-time builds, also of an environment not activated.

    Raises:
        Unavailable: it is not installed.
    """
    found = shutil.which("ninja", path=path_with_scripts())
    if found is None:
        raise Unavailable("ninja is not installed: pip install ninja")
    return found


def path_with_scripts() -> str:
    """PATH, followed by the folder of this Python's scripts."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def cuda() -> CUDAToolkit:
    """The first CUDA compiler of PyTorch's major version: CUDA_HOME, PATH, system, wheels.

    Raises:
        Unavailable: none was found, and the message says why others were rejected; or it is not
            known what to compile for.
    """
    architectures()
    wanted = torch.version.cuda
    if wanted is None:
        raise Unavailable("this PyTorch is built without CUDA")
    rejected = []
    for home in dict.fromkeys(_homes(wanted.split(".")[0])):
        try:
            return _toolkit(home, wanted)
        except Unavailable as error:
            rejected.append(str(error))
    hint = f"install CUDA {wanted}, or for CUDA 13.0 pip install 'irpe-ds[cuda]'"
    raise Unavailable("; ".join([*(rejected or ["nvcc not found"]), hint]))


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
    """Folders of the nvidia wheels of one major version; PyTorch depends on some of them."""
    spec = find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [Path(place) / f"cu{major}" for place in places or ()]


def _toolkit(home: Path, wanted: str) -> CUDAToolkit:
    nvcc, major = home / "bin" / "nvcc", wanted.split(".")[0]
    try:
        printed = subprocess.run(
            [nvcc, "--version"], capture_output=True, check=True, timeout=60, errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"cannot run {nvcc} ({error})") from error
    release = re.search(r"release (\d+\.\d+)", printed.stdout)
    version = release[1] if release else "unknown"
    if version.split(".")[0] != major:
        raise Unavailable(f"{nvcc} is CUDA {version}, PyTorch is built for CUDA {wanted}")
    machine = platform.machine()
    targets = home / "targets" / f"{machine}-linux"  # conda's layout
    wheels = [*_wheels(major), *(wheel.with_name("cuda_runtime") for wheel in _wheels(major))]
    headers = [folder / "include" for folder in (home, targets)]
    libraries = [
        home / "lib64",
        home / "lib",
        targets / "lib",
        home / "lib" / f"{machine}-linux-gnu",
    ]
    libraries += [wheel / "lib" for wheel in wheels]
    include = next((x for x in headers if (x / "cuda_runtime_api.h").exists()), None)
    runtimes = (x / name for x in libraries for name in ("libcudart.so", f"libcudart.so.{major}"))
    runtime = next((x for x in runtimes if x.exists()), None)
    if include is None:
        raise Unavailable(f"{home} has no include/cuda_runtime_api.h")
    if runtime is None:
        raise Unavailable(f"{home} has no libcudart.so")
    return CUDAToolkit(home, version, include, runtime)
