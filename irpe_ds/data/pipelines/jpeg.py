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
HEADERS = (SOURCE.with_name("area.h"), SOURCE.with_name("huffman.h"))
OPTIONS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
LIBRARY = "jpeg.so"
HINT = "install libjpeg-turbo with its headers: libjpeg-dev or libjpeg-turbo-devel"


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_JPEG = (_POINTER, ctypes.c_uint64, _NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER)
_TARGET = (_POINTER, _NUMBER, _NUMBER, _NUMBER)
FUNCTIONS = {
    "decode_box": (*_JPEG, _POINTER, _NUMBER, _POINTER),
    "decode_reduced": (*_JPEG, *_TARGET),
    "reduce": (_POINTER, _NUMBER, _POINTER, *_TARGET),
}
"""The C functions and the types of their arguments."""


def load() -> list[Any]:
    """The FUNCTIONS, which numba calls without Python's lock.

    Raises:
        UserError: they cannot be compiled, or not be kept.
    """
    try:
        library = ctypes.CDLL(str(_library()))
    except (Unavailable, OSError) as error:
        raise UserError(f"cannot build the JPEG decoder: {error}") from None
    functions = [getattr(library, name) for name in FUNCTIONS]
    for function, types in zip(functions, FUNCTIONS.values(), strict=True):
        function.argtypes, function.restype = types, _NUMBER
    return functions


def _library() -> Path:
    """The compiled library: from the cache, or compiled now by one process at a time."""
    root = toolchain.cache_root()
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (SOURCE, *HEADERS)))
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
