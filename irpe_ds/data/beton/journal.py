"""What a conversion has to do and what it has done, in an SQLite file beside the unfinished .beton.

On the disk, since lists of millions of images shall not need memory, and so that a conversion goes
on where it was killed: an image that is entered as done was on the disk before.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from irpe_ds.data.beton.sources import Member, Source, is_image
from irpe_ds.errors import DataError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (value TEXT);
CREATE TABLE IF NOT EXISTS images (
    position INTEGER PRIMARY KEY, label INTEGER, repeated INTEGER,
    category BLOB, name BLOB, file BLOB, offset INTEGER, size INTEGER, stamp INTEGER);
CREATE TABLE IF NOT EXISTS done (
    position INTEGER PRIMARY KEY, start INTEGER, size INTEGER, mode INTEGER, height INTEGER,
    width INTEGER, original INTEGER, sha256 BLOB, reason TEXT);
CREATE TEMP TABLE found (
    category BLOB, name BLOB, file BLOB, offset INTEGER, size INTEGER, stamp INTEGER);
CREATE TEMP TABLE classes (category BLOB PRIMARY KEY, label INTEGER);
CREATE TEMP TABLE fresh AS SELECT * FROM images WHERE 0;
"""

# In the order of the .beton file. Archives may hold a name twice: the second is `repeated`.
_ORDER = """
INSERT INTO fresh
SELECT row_number() OVER w - 1, label,
       category IS lag(category) OVER w AND name IS lag(name) OVER w,
       category, name, file, offset, size, stamp
FROM found JOIN classes USING (category)
WINDOW w AS (ORDER BY label, name, file, offset)
"""

# What was done stays done up to the first image that is another one now.
_KEEP = """
DELETE FROM done WHERE position >= (
    SELECT min(old.position) FROM images old LEFT JOIN fresh new USING (position)
    WHERE (old.label, old.category, old.name, old.file, old.offset, old.size, old.stamp)
       IS NOT (new.label, new.category, new.name, new.file, new.offset, new.size, new.stamp))
"""


class Stored(NamedTuple):
    """An image that is done: where its payload lies, or why it has none."""

    position: int
    start: int
    """Where its payload begins. This and what follows is NULL where there is a reason."""
    size: int
    mode: int
    height: int
    width: int
    original: bool
    sha256: bytes
    reason: str | None
    """Why it was left out."""

    @classmethod
    def left_out(cls, position: int, reason: str) -> "Stored":
        """An image that is not in the file."""
        return cls(position, *(None,) * 7, reason)  # type: ignore[arg-type]


class Journal:
    """One conversion. Use it from one thread.

    Args:
        path: the database; None keeps it in a temporary file.
        settings: what must not change when a conversion goes on.
        anew: forget a conversion with other settings instead.

    Raises:
        DataError: it belongs to a conversion with other settings, or to one that is at work.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, anew: bool = False) -> None:
        try:
            self._db = sqlite3.connect(path or "", isolation_level=None, timeout=0)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            expected = "the journal of a conversion, and none at work"
            raise DataError(path, expected, error) from None
        text = json.dumps(settings, sort_keys=True)
        ((there,),) = self._query("SELECT max(value) FROM settings")
        if there not in (None, text) and not anew:
            self.close()
            old = json.loads(there)
            names = [name for name in settings if old.get(name) != settings[name]]
            where = f"{path} (of an unfinished conversion; --overwrite starts anew)"
            expected = ", ".join(f"{name} {old.get(name)}" for name in names)
            got = ", ".join(str(settings[name]) for name in names)
            raise DataError(where, expected, got)
        self._added: list[Stored] = []
        if there != text:
            self.forget()
            self._db.execute("DELETE FROM settings")
            self._db.execute("INSERT INTO settings VALUES (?)", (text,))

    def forget(self, first: int = 0) -> None:
        """Take the images from this position on for not done."""
        self._db.execute("DELETE FROM done WHERE position >= ?", (first,))
        self._db.execute("PRAGMA user_version = 0")  # not finished

    def close(self) -> None:
        """Close the database; what was not committed is lost."""
        self._db.close()

    def stage(self) -> None:
        """Make what was added part of the next commit, and of what is asked."""
        self._db.executemany("INSERT INTO done VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self._added)
        self._added.clear()

    def commit(self) -> None:
        """Make last what was staged; the payloads must be on the disk before."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    @property
    def finished(self) -> bool:
        """Whether all files of this conversion are complete and on the disk."""
        return self._row("PRAGMA user_version") == (1,)

    def finish(self) -> None:
        """Remember that they are."""
        self._db.execute("PRAGMA user_version = 1")
        self.commit()

    def enter(self, source: Source) -> tuple[tuple[str, ...], int]:
        """Enter the images of a source; class names, and how many other files it has.

        Raises:
            DataError: the source has no images, or not of the classes that it should have.
        """
        others = 0

        def rows() -> Iterator[tuple[object, ...]]:
            nonlocal others
            for member in source.members():
                if is_image(member.name):
                    yield (*map(os.fsencode, member[:3]), *member[3:])
                else:
                    others += 1

        self._db.executemany("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", rows())
        found = [
            os.fsdecode(name) for (name,) in self._query("SELECT DISTINCT category FROM found")
        ]
        classes = source.classes(found)
        if not found:
            raise DataError("--source", f"images in {source.paths[0]}", "none")
        self._db.executemany(
            "INSERT INTO classes VALUES (?, ?)",
            ((os.fsencode(name), label) for label, name in enumerate(classes)),
        )
        self._db.execute(_ORDER)
        self._db.execute(_KEEP)
        self._db.execute("DELETE FROM images")
        self._db.execute("INSERT INTO images SELECT * FROM fresh")
        self.commit()
        return classes, others

    def totals(self) -> tuple[int, ...]:
        """Images listed, and their bytes."""
        return self._row("SELECT count(*), total(size) FROM images")

    def written(self) -> tuple[int, ...]:
        """Images done; where the payloads begin and end; bytes of the largest (0: none)."""
        return self._row(
            "SELECT count(*), ifnull(min(start), 0), ifnull(max(start + size), 0), "
            "ifnull(max(size), 0) FROM done"
        )

    def images(self, first: int, step: int = 1) -> Iterator[tuple[int, Member, bool]]:
        """Position, file, whether the one before has its name; every step-th from the first on."""
        where = "position >= ? AND (position - ?) % ? = 0"
        rows = self._query(f"SELECT * FROM images WHERE {where} ORDER BY 1", first, first, step)
        for position, _, repeated, *member in rows:
            yield position, _member(member), bool(repeated)

    def members(self) -> Iterator[tuple[int, Member]]:
        """Label and file of every image, in order."""
        for _, label, _, *member in self._query("SELECT * FROM images ORDER BY 1"):
            yield label, _member(member)

    def add(self, stored: Stored) -> None:
        """Enter an image as done, when it is staged."""
        self._added.append(stored)

    def kept(self) -> Iterator[tuple[int, str, str, Stored]]:
        """Label, class, name and place of every image in the file, in order."""
        return self._joined("reason IS NULL")

    def skipped(self) -> Iterator[tuple[int, str, str, Stored]]:
        """The same of every image that was left out."""
        return self._joined("reason IS NOT NULL")

    def _joined(self, where: str) -> Iterator[tuple[int, str, str, Stored]]:
        rows = self._query(
            "SELECT label, category, name, done.* FROM done JOIN images USING (position) "
            f"WHERE {where} ORDER BY position"
        )
        for label, category, name, *stored in rows:
            yield label, os.fsdecode(category), os.fsdecode(name), Stored(*stored)

    def counts(self) -> dict[str, int]:
        """Images in the file, those not their source's bytes, those left out, repeated contents."""
        names = ("num_samples", "changed", "skipped", "duplicates")
        query = """
            SELECT count(*) FILTER (WHERE reason IS NULL), count(*) FILTER (WHERE NOT original),
                   count(reason), count(sha256) - count(DISTINCT sha256) FROM done"""
        return dict(zip(names, self._row(query), strict=True))

    def class_counts(self, num_classes: int) -> tuple[int, ...]:
        """Images in the file, of each class."""
        rows = self._query(
            "SELECT label, count(*) FROM done JOIN images USING (position) "
            "WHERE reason IS NULL GROUP BY label"
        )
        counts = dict(rows)
        return tuple(counts.get(label, 0) for label in range(num_classes))

    def _query(self, text: str, *values: object) -> Iterable[Any]:
        return self._db.execute(text, values)

    def _row(self, text: str) -> tuple[int, ...]:
        (row,) = self._query(text)
        return tuple(map(int, row))


def _member(row: list[Any]) -> Member:
    category, name, file, *numbers = row
    return Member(os.fsdecode(category), os.fsdecode(name), os.fsdecode(file), *numbers)
