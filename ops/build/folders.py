"""Folders of compiled code: no other user's, built in by one process at a time, complete.

What is read from them runs as the user.
"""

import contextlib
import hashlib
import os
import pwd
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from irpe_ds.files import lock_file, open_own, read_regular
from irpe_ds.ops.build.toolchain import Unavailable

FINISHED = "finished"
"""The file beside a complete build: the SHA-256 of its library."""
FAILED = "failed"
"""The file with the reason of the last failure: processes that waited for it do not try again."""
LOCK = "building"
"""The file whose lock (flock) a process holds while it builds; the lock ends with its process."""
PYTORCH_LOCK = "lock"
"""PyTorch's own. Up to torch 2.13 it is a file whose existence counts, also when its process was
killed, and every later one waits for good; later it is a lock, for which they wait in silence."""

MAX_LIBRARY = 1 << 28  # bytes; ours has 3 MB
POLL_SECONDS, SAY_SECONDS, GIVE_UP_SECONDS = 0.5, 30.0, 1800.0


def untrusted_reason(path: Path, root: Path) -> str | None:
    """Who else could put code at a path; None when only the user and root could.

    Args:
        path: a file or folder; what does not exist is trusted.
        root: a folder above or the path itself, the uppermost to be looked at. Folders in which
            others may create files but not replace them, as /tmp, may be above the path.
    """
    uppermost = [path, *path.parents].index(root)
    for each in (path, *path.parents[:uppermost]):
        for look in (os.lstat, os.stat):  # a link, and what it leads to
            try:
                found = look(each)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                return str(error)
            if found.st_uid not in (0, os.getuid()):
                return f"{each} belongs to {_user(found.st_uid)}"
            may_be_sticky = each != path and found.st_mode & stat.S_ISVTX
            is_link = stat.S_ISLNK(found.st_mode)  # all of them have mode 0777
            if found.st_mode & stat.S_IWOTH and not is_link and not may_be_sticky:
                return f"every user can write to {each}"
    return None


def check(path: Path, root: Path) -> None:
    """Raise Unavailable for an `untrusted_reason`."""
    reason = untrusted_reason(path, root)
    if reason is not None:
        hint = "set TORCH_EXTENSIONS_DIR to a folder of your own"
        raise Unavailable(f"refused code that other users could replace: {reason}; {hint}")


def is_complete(library: Path) -> bool:
    """Whether a library is as its build left it."""
    try:
        recorded = read_regular(library.with_name(FINISHED), 100).decode()
        return not library.is_symlink() and recorded == _sha256(library)
    except (OSError, UnicodeDecodeError):
        return False


def mark_complete(library: Path) -> None:
    """Keep the library's hash beside it."""
    with open_own(library.with_name(FINISHED), "w") as file:
        file.write(_sha256(library))


def clear(folder: Path) -> None:
    """Remove what a build left, damaged or not; ninja goes by time, and would keep it."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def not_writable_by_all() -> Iterator[None]:
    """Create files and folders that not every user can write to, whatever the umask."""
    umask = os.umask(0o077)
    os.umask(umask | stat.S_IWOTH)
    try:
        yield
    finally:
        os.umask(umask)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; waiting for another process is said, with its command.

    Raises:
        Unavailable: the same one has it for half an hour.
        OSError: the file system has no locks, or does not allow to create one.
    """
    for _ in _turns(folder, folder / LOCK):
        with contextlib.suppress(BlockingIOError):
            lock = lock_file(folder / LOCK)
            break
    with lock:
        os.utime(lock.fileno())
        for _ in _turns(folder, folder / PYTORCH_LOCK):
            if not processes_with(folder / PYTORCH_LOCK):
                (folder / PYTORCH_LOCK).unlink(missing_ok=True)
                break
        yield


def processes_with(path: Path) -> list[int]:
    """The processes of this host that have a file open, as far as this user may see."""
    name, found = os.path.realpath(path), []
    for descriptors in Path("/proc").glob("[0-9]*/fd") if os.path.lexists(path) else ():
        with contextlib.suppress(OSError):  # another user's, or gone
            # By name: to look at the files themselves may wait for a network that is down.
            if any(_target(descriptor) == name for descriptor in descriptors.iterdir()):
                found.append(int(descriptors.parent.name))
    return found


def _turns(folder: Path, lock: Path) -> Iterator[None]:
    """Turns to try for a lock; says who has it, and at last gives up."""
    began = said = time.monotonic()
    taken = 0.0
    while True:
        yield
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - said < SAY_SECONDS:
            continue
        with contextlib.suppress(FileNotFoundError):
            if taken != lock.lstat().st_mtime:  # by another process than before
                taken, began = lock.lstat().st_mtime, now
        said, holder = now, _describe(processes_with(lock))
        print(f"waiting for {holder} to build the operators in {folder}", file=sys.stderr)
        if now - began >= GIVE_UP_SECONDS:
            raise Unavailable(f"waited half an hour for {holder} to build in {folder}: end it")


def _describe(processes: list[int]) -> str:
    if not processes:
        return "a process, of another host or user,"
    folder = Path("/proc") / str(processes[0])
    with contextlib.suppress(OSError):
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        shown = "".join(c if c.isprintable() else "?" for c in command.strip()[:100])
        return f"process {processes[0]} ({shown})"
    return f"process {processes[0]}"


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:  # closed by now
        return ""


def _sha256(file: Path) -> str:
    return hashlib.sha256(read_regular(file, MAX_LIBRARY)).hexdigest()


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
