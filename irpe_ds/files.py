"""Files: complete on disk or absent, locked, and read back without trusting them."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Literal, TextIO

SHIPPED = Path(__file__).parent / "scripts"
"""The repository's launch/, data_prep/ and ds_configs/, which the package brings along."""


def or_shipped(path: Path, folder: Path = Path()) -> Path:
    """A path relative to a folder; where nothing is there, the file that the package brings."""
    here, shipped = folder / path, SHIPPED / path
    return shipped if os.path.exists(shipped) and not os.path.lexists(here) else here


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
    block raises, the temporary file is removed and `path` is unchanged. What has the temporary name
    already, left by a kill or a link planted there, is removed and not written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
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
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def open_own(path: Path, mode: Literal["a", "w"] = "a") -> TextIO:
    """Open a text file that this program keeps, to append (`a`) or overwrite (`w`).

    A link planted under its name is not followed: the file that it points to is not ours.

    Raises:
        OSError: it cannot be opened, or is a link or another thing that is no regular file.
    """

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "a symbolic link in place of a file", name) from None
            raise
        _check_regular(descriptor, path)
        return descriptor

    return open(path, mode, buffering=1, encoding="utf-8", newline="", opener=opener)


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file to read; links are followed. Never waits, as opening a FIFO would.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path | str, limit: int) -> bytes:
    """The bytes of a regular file.

    The size that the file system tells is not trusted: files of /proc say 0.

    Raises:
        OSError: as `open_regular`, or the file has more than `limit` bytes.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data


def _check_regular(descriptor: int, path: Path | str) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def lock_file(path: Path, wait: bool = False) -> TextIO:
    """Create a file if need be and lock it (flock) until it is closed or the process ends.

    Args:
        wait: for another process that holds the lock.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened, or its file system does not support locks.
    """
    file = open_own(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file
