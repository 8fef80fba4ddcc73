"""Decodes a box of a JPEG: jpeg.cpp, compiled once, into PyTorch's extension cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from irpe_ds.errors import UserError
from irpe_ds.ops.build import folders, toolchain
from irpe_ds.ops.build.toolchain import Unavailable

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O2", "-shared", "-fPIC")
LIBRARY = "jpeg.so"
HINT = "install libjpeg-turbo with its headers: libjpeg-dev or libjpeg-turbo-devel"


def load() -> Any:
    """The C function `decode_box`, which numba calls without Python's lock.

    Raises:
        UserError: it cannot be compiled, or not be kept.
    """
    try:
        return _typed(ctypes.CDLL(str(_library())).decode_box)
    except (Unavailable, OSError) as error:
        raise UserError(f"cannot build the JPEG decoder: {error}") from None


def _typed(function: Any) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    image, box = [pointer, ctypes.c_uint64, number, number], [pointer, number, number]
    function.argtypes = [*image, *box, pointer, number, pointer]
    function.restype = number
    return function


def _library() -> Path:
    """The compiled library: from the cache, or compiled now by one process at a time."""
    root = toolchain.cache_root()
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((OPTIONS, platform.machine(), os.environ.get("CXX"))).encode())
    file = root / f"irpe_jpeg_{key.hexdigest()[:16]}" / LIBRARY
    if not folders.is_complete(file):
        with folders.not_writable_by_all():
            file.parent.mkdir(parents=True, exist_ok=True)
            folders.check(file.parent, root)
            with folders.locked(file.parent):
                if not folders.is_complete(file):
                    _compile(file)
    for path in (file.parent, file, file.with_name(folders.FINISHED)):
        folders.check(path, root)
    return file


def _compile(file: Path) -> None:
    made = file.with_name(f"{LIBRARY}.partial")
    command = [*toolchain.cxx().split(), *OPTIONS, str(SOURCE), "-o", str(made), *_flags()]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        lines = ended.stderr.splitlines() or ["the compiler failed"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{first.strip()}; {HINT}")
    made.rename(file)
    folders.mark_complete(file)


def _flags() -> list[str]:
    """Where libjpeg-turbo is; conda's is not among the system's."""
    if shutil.which("pkg-config"):
        command = ["pkg-config", "--cflags", "--libs", "libjpeg"]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.split()
    return ["-ljpeg"]
