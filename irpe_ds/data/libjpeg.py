"""C++ that calls libjpeg-turbo: compiled once, into PyTorch's extension cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from irpe_ds.errors import UserError
from irpe_ds.ops.build import folders, toolchain
from irpe_ds.ops.build.toolchain import Unavailable

OPTIONS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
HINT = "install libjpeg-turbo with its headers: libjpeg-dev or libjpeg-turbo-devel"


def load(source: Path, headers: Sequence[Path], what: str) -> ctypes.CDLL:
    """The library of one source file.

    Args:
        headers: those of ours that it includes.
        what: it is, for errors.

    Raises:
        UserError: it cannot be compiled, or not be kept.
    """
    try:
        return ctypes.CDLL(str(_library(source, headers)))
    except (Unavailable, OSError) as error:
        raise UserError(f"cannot build {what}: {error}") from None


def _library(source: Path, headers: Sequence[Path]) -> Path:
    """The compiled library: from the cache, or compiled now by one process at a time."""
    root = toolchain.cache_root()
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *headers)))
    key.update(repr((OPTIONS, platform.machine(), os.environ.get("CXX"))).encode())
    folder = root / f"irpe_{source.stem}_{key.hexdigest()[:16]}"
    file = folder / f"{source.stem}.so"
    if not folders.is_complete(file):
        with folders.not_writable_by_all():
            folder.mkdir(parents=True, exist_ok=True)
            folders.check(folder, root)
            with folders.locked(folder):
                if not folders.is_complete(file):
                    _compile(source, file)
    for path in (folder, file, folder / folders.FINISHED):
        folders.check(path, root)
    return file


def _compile(source: Path, file: Path) -> None:
    made = file.with_suffix(".partial")
    command = [*toolchain.cxx().split(), *OPTIONS, str(source), "-o", str(made), *_flags()]
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
