"""The folders that a conversion writes to, and which of them has failed."""

import os
import shutil
import sqlite3
from pathlib import Path

from irpe_ds.errors import DataError


def target(out: Path) -> Path:
    """The file itself where `out` is a symbolic link: what belongs beside it goes there too."""
    return Path(os.path.realpath(out)) if out.is_symlink() else out


def temporary_folder() -> Path:
    """Where SQLite puts what it sorts: the first of its choices that can be written to."""
    named = [os.environ[name] for name in ("SQLITE_TMPDIR", "TMPDIR") if name in os.environ]
    for folder in map(Path, [*named, "/var/tmp", "/usr/tmp", "/tmp"]):
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return Path()


def existing(folder: Path) -> Path:
    """A folder, or the one above it in which it would be made."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def cannot_write(out: Path, error: OSError | sqlite3.Error) -> DataError:
    """The error of a disk that failed or is full; names the folder."""
    if isinstance(error, OSError):
        reason = f"{error.strerror}: {error.filename or out.parent}"
    else:
        reason = failed_place(error, existing(out.parent))
    done = "what is done is kept; rerun the same command to continue"
    return DataError(f"--out: cannot write {out}: {reason}; {done}")


def failed_place(error: sqlite3.Error, *folders: Path) -> str:
    """What SQLite met, and in which of these folders or the temporary one: that with less space."""
    temporary = temporary_folder()
    if "full" not in str(error):
        return f"{error}: {', '.join(map(str, folders))}, or {temporary} (TMPDIR)"
    folder = min((*folders, temporary), key=lambda folder: shutil.disk_usage(folder).free)
    purpose = ", where SQLite sorts (TMPDIR=... for another)" if folder is temporary else ""
    return f"No space left on device: {folder}{purpose}"
