"""CUDA kernels compiled at run time by NVRTC, for what a model needs and the GPU that is there.

NVRTC comes with PyTorch's wheels, so no toolkit is needed. A kernel takes a few seconds; it is kept
on disk, under a name made of its sources, its options and the compiler's version.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from irpe_ds.files import atomic_write, read_regular
from irpe_ds.ops.build import folders
from irpe_ds.ops.build.toolchain import Unavailable

OPTIONS = ("-std=c++20", "-default-device", "--generate-line-info")
MAX_KERNEL = 1 << 26  # bytes; ours have 300 KB


def compile_kernel(source: Path, defines: Mapping[str, int], architecture: str) -> bytes:
    """Compile a .cu file with these macros; the .cuh files beside it may be included.

    Args:
        architecture: `sm_90` for machine code, `compute_90` for PTX.

    Raises:
        Unavailable: there is no NVRTC, or it knows no such architecture.
        RuntimeError: the source does not compile.
    """
    options = _options(defines, architecture)
    digest = hashlib.sha256("\0".join([version(), *options]).encode())
    for path in sorted({source, *source.parent.glob("*.cuh")}):
        digest.update(path.read_bytes())
    name = f"{source.stem}-{architecture}-{digest.hexdigest()[:32]}.kernel"
    kept = _read(cache_folder() / name)
    if kept is not None:
        return kept
    binary = _compile(source, options, architecture)
    _keep(cache_folder() / name, binary)
    return binary


def resource_report(source: Path, defines: Mapping[str, int], architecture: str) -> str:
    """What ptxas says of a kernel: registers, stack and spills. It is compiled anew.

    Args:
        architecture: of machine code, `sm_90`.

    Raises:
        Unavailable, RuntimeError: as `compile_kernel`.
    """
    options = [*_options(defines, architecture), "--ptxas-options=-v"]
    with _program(source, options, architecture) as program:
        return _log(program)


def cache_folder() -> Path:
    """IRPE_KERNEL_CACHE, or irpe_ds/kernels in the user's folder for caches."""
    chosen = os.environ.get("IRPE_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "irpe_ds" / "kernels"


def version() -> str:
    """NVRTC's, such as 13.0."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def unavailable_reason() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    try:
        _library()
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    if torch.version.cuda is None:
        raise Unavailable("this PyTorch is built without CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    try:
        for path in sorted(wheels.glob(f"*/lib/{name}")):
            # It looks its built-in functions up by name alone, in no folder.
            for builtins in path.parent.glob(f"libnvrtc-builtins.so.{torch.version.cuda}*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        return ctypes.CDLL(name)  # a system's CUDA
    except OSError as error:
        raise Unavailable(f"cannot load NVRTC: {error}") from None


def _read(path: Path) -> bytes | None:
    """The kernel in a file, after its SHA-256; None where there is none, or not as it was kept."""
    with contextlib.suppress(OSError):
        data = read_regular(path, MAX_KERNEL)
        if not _is_trusted(path):
            return None
        digest, binary = data[:32], data[32:]
        if hashlib.sha256(binary).digest() == digest:
            return binary
        print(f"{path} is damaged: the kernel is compiled again", file=sys.stderr)
    return None


def _keep(path: Path, binary: bytes) -> None:
    with contextlib.suppress(OSError):  # a folder that cannot be written costs only the time
        with folders.not_writable_by_all():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not _is_trusted(path):
                return
            own = path.with_name(f"{path.name}.{os.getpid()}")  # ranks compile it at the same time
            with atomic_write(own) as partial:
                partial.write_bytes(hashlib.sha256(binary).digest() + binary)
        os.replace(own, path)


def _is_trusted(path: Path) -> bool:
    """Whether no other user could have written a kernel here; said when one could, once."""
    reason = folders.untrusted_reason(path.parent, path.parent)
    reason = reason or folders.untrusted_reason(path, path.parent)
    if reason is not None:
        _say_once(
            f"{reason}, so kernels are compiled anew: set IRPE_KERNEL_CACHE to another folder"
        )
    return reason is None


@functools.cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def _options(defines: Mapping[str, int], architecture: str) -> list[str]:
    macros = [f"-D{name}={int(value)}" for name, value in sorted(defines.items())]
    return [*OPTIONS, *macros, f"--gpu-architecture={architecture}"]


def _compile(source: Path, options: list[str], architecture: str) -> bytes:
    with _program(source, options, architecture) as program:
        return _get(program, "PTX" if architecture.startswith("compute_") else "CUBIN")


@contextlib.contextmanager
def _program(source: Path, options: list[str], architecture: str) -> Iterator[ctypes.c_void_p]:
    """NVRTC's, compiled."""
    nvrtc, program, text = _library(), ctypes.c_void_p(), source.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, str(source).encode(), 0, None, None)
    try:
        options = [*options, f"-I{source.parent}"]
        arguments = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            said = _log(program)
            if "gpu-architecture" in said:
                raise Unavailable(f"NVRTC {version()} does not compile for {architecture}")
            raise RuntimeError(f"cannot compile {source.name} {' '.join(options)}:\n{said}")
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _get(program: ctypes.c_void_p, what: str) -> bytes:
    """PTX, CUBIN or ProgramLog."""
    nvrtc, size = _library(), ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _log(program: ctypes.c_void_p) -> str:
    return _get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
