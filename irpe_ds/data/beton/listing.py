"""The images of a source with their classes: one rule for every kind of source.

What is listed is in SQLite: millions of images would fill the memory.
"""

import os
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from irpe_ds.data.beton import left_out
from irpe_ds.data.beton.labelling import ByFolder, ByLabel, ByList, Lister
from irpe_ds.data.beton.sources import Source, is_image
from irpe_ds.data.beton.sources.source import is_hidden
from irpe_ds.errors import DataError

_TABLES = (
    """CREATE TEMP TABLE files (
    path BLOB, file BLOB, offset INTEGER, size INTEGER, stamp INTEGER, label BLOB,
    depth INTEGER)""",
    "CREATE TEMP TABLE folders (path BLOB PRIMARY KEY)",
    """CREATE TEMP TABLE found (
    category BLOB, name BLOB, file BLOB, offset INTEGER, size INTEGER, stamp INTEGER)""",
    "CREATE TEMP TABLE classes (category BLOB PRIMARY KEY, label INTEGER)",
    left_out.TABLE,
)
# The first of each class, then the second of each.
_CHOOSE = """
DELETE FROM found WHERE rowid NOT IN (
    SELECT place FROM (
        SELECT found.rowid AS place, label, row_number() OVER (
            PARTITION BY label ORDER BY name, file, offset) - 1 AS rank
        FROM found JOIN classes USING (category))
    WHERE rank % ? = 0 ORDER BY rank, label LIMIT ?)
"""


class Listing(NamedTuple):
    """What was listed."""

    classes: tuple[str, ...]
    """Class names in label order."""
    counts: tuple[int, ...]
    """Images of each."""
    left_out: int
    """Files that are no images."""
    notes: tuple[str, ...]
    """What is to be told of the choice of images and classes."""


def list_source(db: sqlite3.Connection, source: Source) -> tuple[tuple[str, ...], int, list[str]]:
    """Fill the tables `found`, with the images to take, and `classes`.

    Returns:
        Class names in label order, the number of other files, and notes.

    Raises:
        DataError: there are no images, or not one class for each.
    """
    for table in _TABLES:
        db.execute(table)
    options = source.options
    common, other_files = _list_files(db, source)
    lister: Lister
    if options.labels is not None:
        lister = ByList(db, source, common)
    elif source.has_labels:
        lister = ByLabel(db, source, common)
    else:
        lister = ByFolder(db, source, common)
    classes = lister.fill()
    db.executemany(
        "INSERT INTO classes VALUES (?, ?)",
        ((os.fsencode(name), label) for label, name in enumerate(classes)),
    )
    if options.every > 1 or options.limit is not None:
        db.execute(_CHOOSE, (options.every, -1 if options.limit is None else options.limit))
    return classes, other_files, lister.notes


def _list_files(db: sqlite3.Connection, source: Source) -> tuple[tuple[str, ...], int]:
    """Fill the tables `files` and `folders`.

    Returns:
        The deepest folder that all images are in, and the number of other files.
    """
    common: tuple[str, ...] | None = None
    other_files = 0

    def images() -> Iterator[tuple[object, ...]]:
        nonlocal common, other_files
        last = None
        for found in source.files():
            if not found.path.startswith(source.within):
                continue
            path = found.path[len(source.within) :]
            if path.endswith("/"):
                if not is_hidden(path):
                    db.execute(
                        "INSERT OR IGNORE INTO folders VALUES (?)", (os.fsencode(path[:-1]),)
                    )
            elif not is_image(path):
                if path:
                    other_files += 1
                    left_out.leave_out(db, path)
            else:
                folder, _, _ = path.rpartition("/")
                if folder != last:
                    last, parts = folder, tuple(folder.split("/")) if folder else ()
                    common = parts if common is None else _shared(common, parts)
                names = os.fsencode(path), os.fsencode(found.file)
                label = None if found.label is None else os.fsencode(found.label)
                yield *names, found.offset, found.size, found.stamp, label, path.count("/")

    db.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", images())
    if common is None:
        raise DataError("--source", f"images in {source.paths[0]}", "no images")
    return common, other_files


def _shared(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that two paths begin with."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]
