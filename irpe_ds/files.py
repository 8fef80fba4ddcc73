"""Files that are complete on disk or absent: fsync, atomic replacement, locks."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def fsync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; afterwards flush it to disk and rename it to `path`.

    Readers, and a machine that crashes, see the old file or the new one, never part of one. If the
    block raises, the temporary file is removed and `path` is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def replace_file(path: Path, text: str) -> None:
    """Atomically give a file this content."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def lock_file(path: Path) -> TextIO:
    """Create a file if need be and lock it (flock) until it is closed or the process ends.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened, or its file system does not support locks.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
