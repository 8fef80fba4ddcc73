r"""Lists of the files of a source that are not in the .beton: FILE.beton.skipped and .left_out.

A line is a file's class/name, a tab, and the reason. A backslash, tab or end of line within these
is written as \\, \t, \n or \r, so that every line can be read back.
"""

import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from irpe_ds.files import open_regular

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_CHARACTERS = {escape: character for character, escape in _ESCAPES.items()}
_SPECIAL = re.compile(r"[\\\t\n\r]")
_SHOWN = 5  # extensions


TABLE = "CREATE TEMP TABLE left_out (path BLOB, reason TEXT)"


class ListedFile(NamedTuple):
    """A line."""

    name: str
    """class/name, or the name alone of a file in no class."""
    reason: str


def leave_out(db: sqlite3.Connection, path: str) -> None:
    """Add a file that is no image to TABLE."""
    hidden = os.path.basename(path).startswith(".")
    reason = "a hidden file" if hidden else "no extension of an image"
    db.execute("INSERT INTO left_out VALUES (?, ?)", (os.fsencode(path), reason))


def left_out(db: sqlite3.Connection) -> Iterator[ListedFile]:
    """The files in TABLE, in order."""
    for path, reason in db.execute("SELECT path, reason FROM left_out ORDER BY path"):
        yield ListedFile(os.fsdecode(path), reason)


def list_line(name: str, reason: str) -> bytes:
    """A file and why it is not in the .beton, as a line."""
    columns = (_SPECIAL.sub(lambda found: _ESCAPES[found[0]], text) for text in (name, reason))
    return os.fsencode("\t".join(columns) + "\n")


def read_list(path: Path) -> Iterator[ListedFile]:
    """The lines of a list; none if there is no such file."""
    if not path.exists():
        return
    with open_regular(path) as file:
        for line in file:
            columns = os.fsdecode(line).rstrip("\n").split("\t")
            yield ListedFile(*(_original(column) for column in columns))


def _original(column: str) -> str:
    return re.sub(r"\\.", lambda found: _CHARACTERS[found[0]], column)


def by_extension(path: Path) -> str:
    """How many files of a list have which extension: `.txt 3, .gif 1`."""
    return count_extensions(file.name for file in read_list(path))


def count_extensions(names: Iterator[str]) -> str:
    """The same of files with these names; of few extensions, the most frequent ones."""
    counts: Counter[str] = Counter()
    for name in names:
        extension = os.path.splitext(name)[1].lower()
        counts[extension if re.fullmatch(r"\.[a-z0-9_]{1,8}", extension) else ""] += 1
    total = counts.total()
    del counts[""]
    shown = counts.most_common(_SHOWN)
    others = total - sum(count for _, count in shown)
    return ", ".join(f"{name} {count}" for name, count in [*shown, ("others", others)] if count)
