"""The state of a conversion: images to do and images done, in SQLite beside the unfinished .beton.

On disk, so that lists of millions of images need no memory, and a killed conversion resumes:
an image is committed as done only after its payload is on the disk.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from irpe_ds.data.beton import left_out
from irpe_ds.data.beton.listing import Listing, list_source
from irpe_ds.data.beton.manifest import beside, is_there
from irpe_ds.data.beton.places import failed_place
from irpe_ds.data.beton.sources import Member, Source, open_source
from irpe_ds.errors import ConfigError, DataError, UserError
from irpe_ds.files import open_regular

JOURNAL = ".partial.db"
PARTIAL = ".partial"
"""Suffixes of the files of an unfinished conversion."""

_TABLES = {
    "settings": "CREATE TABLE settings (value TEXT)",
    "images": """CREATE TABLE images (
    position INTEGER PRIMARY KEY, label INTEGER, repeated INTEGER,
    category BLOB, name BLOB, file BLOB, offset INTEGER, size INTEGER, stamp INTEGER)""",
    "done": """CREATE TABLE done (
    position INTEGER PRIMARY KEY, start INTEGER, size INTEGER, mode INTEGER, height INTEGER,
    width INTEGER, original INTEGER, sha256 BLOB, reason TEXT, digest BLOB)""",
}

# In the order of the .beton file. A name may occur twice in an archive: the second is `repeated`.
_ORDER = """
CREATE TEMP TABLE fresh AS
SELECT row_number() OVER w - 1 AS position, label,
       category IS lag(category) OVER w AND name IS lag(name) OVER w AS repeated,
       category, name, file, offset, size, stamp
FROM found JOIN classes USING (category)
WINDOW w AS (ORDER BY label, name, file, offset)
"""

# What is done is kept up to the first image that differs from the new list.
_KEEP = """
DELETE FROM done WHERE position >= (
    SELECT min(old.position) FROM images old LEFT JOIN fresh new USING (position)
    WHERE (old.label, old.category, old.name, old.file, old.offset, old.size, old.stamp)
       IS NOT (new.label, new.category, new.name, new.file, new.offset, new.size, new.stamp))
"""


_DONE_BYTES = 75  # of an image in the table of what is done
_SORTING = 4  # times the table of images that SQLite takes to sort it; measured


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file, unless told to or when a conversion of ours may resume.

    Raises:
        ConfigError: `out` exists.
    """
    if is_there(out) and not overwrite and not beside(out, JOURNAL).exists():
        raise already_exists(out)


def already_exists(out: Path) -> ConfigError:
    """The error of a file that would be replaced."""
    return ConfigError("--out", "a new file, or --overwrite", f"{out}, which exists")


def damaged_journal(path: Path | None, found: object) -> DataError:
    """The error of a file that is no journal of ours, or a damaged one; it is left as it is."""
    return DataError(path, "the journal of a conversion (remove it to start over)", found)


def of_another(where: str, old: dict[str, Any], new: dict[str, Any]) -> ConfigError:
    """The error of a conversion that was begun with other settings: which differ."""
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    expected = ", ".join(f"{name} {old.get(name)}" for name in names)
    return ConfigError(where, expected, ", ".join(str(new.get(name)) for name in names))


class DoneImage(NamedTuple):
    """An image that is done: the extent of its payload, or why it was skipped."""

    position: int
    start: int
    """Offset of its payload. This and the following are NULL if there is a reason."""
    size: int
    mode: int
    height: int
    width: int
    original: int
    """1: the bytes of the source file; 0: encoded anew."""
    sha256: bytes
    reason: str | None
    """Why it was skipped."""

    @classmethod
    def skipped(cls, position: int, reason: str) -> "DoneImage":
        """An image that is not in the file."""
        return cls(position, *(None,) * 7, reason)  # type: ignore[arg-type]


class Journal:
    """The state of one conversion. Use it from one thread.

    Args:
        path: the database. None: a temporary file.
        identity: what must not change when a conversion resumes: source, options, versions.
        restart: discard the state of a conversion with another identity.

    Raises:
        DataError: the file is no journal, or another conversion is using it.
        OSError: it cannot be written.
        ConfigError: the state has another identity.
    """

    def __init__(
        self, path: Path | None, identity: dict[str, Any], *, restart: bool = False
    ) -> None:
        self._path, self._added = path, list[DoneImage]()
        self._first = 0  # position of the first image in the whole source
        _check_file(path)
        try:
            self._db = sqlite3.connect(path or "", isolation_level=None, timeout=0)
            self._db.text_factory = os.fsdecode
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("BEGIN EXCLUSIVE")
            self._open_tables()
            ((stored,),) = self._query("SELECT max(value) FROM settings")
        except sqlite3.Error as error:
            if "locked" in str(error):
                running = "locked: another conversion to this file is running"
                raise DataError(f"{path} is {running}; wait for it, or end it") from None
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise damaged_journal(path, error) from None
        text = json.dumps(identity, sort_keys=True)
        if stored not in (None, text) and not restart:
            self.close()
            raise self._of_another(stored, identity)
        if stored != text:
            self.discard()
            self._db.execute("DELETE FROM settings")
            self._db.execute("INSERT INTO settings VALUES (?)", (text,))
        self._check_done()

    def _open_tables(self) -> None:
        """Create the tables in a new file; another program's file is left as it is."""
        found = dict(self._query("SELECT name, sql FROM sqlite_master"))
        if not found:
            for table in _TABLES.values():
                self._db.execute(table)
        elif found != _TABLES:
            raise damaged_journal(self._path, "tables of another version or another program")

    def _check_done(self) -> None:
        """Compare what is done with its digests: SQLite does not notice changed bytes."""
        for number, row in enumerate(self._query("SELECT * FROM done ORDER BY position")):
            if row[0] != number or row[-1] != _digest(row[:-1]):
                raise damaged_journal(self._path, f"damage in image {number}")

    def _of_another(self, stored: object, identity: dict[str, Any]) -> UserError:
        """The error of a journal with other settings."""
        try:
            old = dict(json.loads(str(stored)))
        except (ValueError, TypeError, RecursionError):
            return damaged_journal(self._path, "damaged settings")
        where = f"{self._path} (of an unfinished conversion; --overwrite starts over)"
        return of_another(where, old, identity)

    def discard(self, first: int = 0) -> None:
        """Mark the images from this position on as not done."""
        self._db.execute("DELETE FROM done WHERE position >= ?", (first,))
        self._db.execute("PRAGMA user_version = 0")  # not finished

    def close(self) -> None:
        """Close the database without committing."""
        self._db.close()

    def stage(self) -> None:
        """Make added images visible to queries and part of the next commit."""
        rows = ((*image, _digest(image)) for image in self._added)
        self._db.executemany("INSERT INTO done VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self._added.clear()

    def commit(self) -> None:
        """Commit what is staged; its payloads must be on the disk already."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    @property
    def finished(self) -> bool:
        """Whether all files of this conversion are complete and on the disk."""
        return self._row("PRAGMA user_version") == (1,)

    def finish(self) -> None:
        """Commit that they are."""
        self._db.execute("PRAGMA user_version = 1")
        self.commit()

    def list_source(self, source: Source) -> Listing:
        """List the images to take of a source, and what is done of them.

        Raises:
            DataError: the source has no images, an image of none of its classes, or more than fit
            into the temporary folder.
        """
        try:
            return self._list_source(source)
        except sqlite3.OperationalError as error:
            folders = () if self._path is None else (self._path.parent,)
            raise DataError(f"cannot list the images: {failed_place(error, *folders)}") from None

    def _list_source(self, source: Source) -> Listing:
        classes, other_files, notes = list_source(self._db, source)
        self._db.execute(_ORDER)
        self._db.execute(_KEEP)
        self._db.execute("DELETE FROM images")
        self._db.execute("INSERT INTO images SELECT * FROM fresh")
        self.commit()
        counts = dict(self._query("SELECT label, count(*) FROM images GROUP BY label"))
        found = tuple(counts.get(label, 0) for label in range(len(classes)))
        return Listing(classes, found, other_files, tuple(notes))

    def totals(self) -> tuple[int, ...]:
        """Number of images listed, and their bytes."""
        return self._row("SELECT count(*), total(size) FROM images")

    def written(self) -> tuple[int, ...]:
        """Images done; begin and end of the payloads; bytes of the largest one (0: none)."""
        return self._row(
            "SELECT count(*), ifnull(min(start), 0), ifnull(max(start + size), 0), "
            "ifnull(max(size), 0) FROM done"
        )

    def listed(self, begin: int, end: int) -> Iterator[str]:
        """The images listed at these positions, a line of JSON each, for `load`."""
        query = "SELECT * FROM images WHERE position >= ? AND position < ? ORDER BY 1"
        for row in self._query(query, begin, end):
            values = [os.fsdecode(value) if isinstance(value, bytes) else value for value in row]
            yield json.dumps(values) + "\n"

    def load(self, lines: Iterable[str]) -> None:
        """List, in place of a source, the images that `listed` gave; their positions begin at 0."""
        self._db.execute(left_out.TABLE)
        for number, line in enumerate(lines):
            position, *row = json.loads(line)
            if number == 0:
                self._first = position
            values = [os.fsencode(value) if isinstance(value, str) else value for value in row]
            places = ", ".join("?" * (1 + len(values)))
            self._db.execute(f"INSERT INTO images VALUES ({places})", (number, *values))

    def left_out(self) -> Iterator[left_out.ListedFile]:
        """Every file listed that is no image."""
        return left_out.left_out(self._db)

    def needs(self) -> tuple[int, int]:
        """Bytes that a conversion of what is listed takes: its journal, and SQLite in TMPDIR."""
        images, temporary = (
            self._row(f"PRAGMA {name}.page_count")[0] * self._row(f"PRAGMA {name}.page_size")[0]
            for name in ("main", "temp")
        )
        return images + _DONE_BYTES * self.totals()[0], _SORTING * images + temporary

    def last_class(self) -> tuple[str | None, bool]:
        """Class of the last image done (None: none is), and whether one of it is in the file."""
        query = """
            SELECT category, EXISTS (SELECT * FROM done JOIN images USING (position)
                                     WHERE label = last.label AND reason IS NULL)
            FROM images last WHERE position = (SELECT max(position) FROM done)"""
        for category, good in self._query(query):
            return os.fsdecode(category), bool(good)
        return None, False

    def images(self, first: int, step: int = 1) -> Iterator[tuple[int, Member, bool]]:
        """Position in the whole source, file, and whether its name repeats the previous one.

        Of every step-th image.
        """
        where = "position >= ? AND (position - ?) % ? = 0"
        rows = self._query(f"SELECT * FROM images WHERE {where} ORDER BY 1", first, first, step)
        for position, _, repeated, *member in rows:
            yield self._first + position, _member(member), bool(repeated)

    def members(self) -> Iterator[tuple[int, Member]]:
        """Label and file of every image, in order."""
        for _, label, _, *member in self._query("SELECT * FROM images ORDER BY 1"):
            yield label, _member(member)

    def add(self, image: DoneImage) -> None:
        """Record an image as done, from the next `stage` on."""
        self._added.append(image)

    def kept(self) -> Iterator[tuple[int, str, str, DoneImage]]:
        """Label, class, name and record of every image in the file, in order."""
        return self._joined("reason IS NULL")

    def skipped(self) -> Iterator[tuple[int, str, str, DoneImage]]:
        """The same for every image that was skipped."""
        return self._joined("reason IS NOT NULL")

    def _joined(self, where: str) -> Iterator[tuple[int, str, str, DoneImage]]:
        rows = self._query(
            f"SELECT label, category, name, {', '.join(f'done.{c}' for c in DoneImage._fields)} "
            "FROM done JOIN images USING (position) "
            f"WHERE {where} ORDER BY position"
        )
        for label, category, name, *done in rows:
            yield label, os.fsdecode(category), os.fsdecode(name), DoneImage(*done)

    def counts(self) -> dict[str, int]:
        """Counts for the manifest: images in the file, changed, skipped, duplicates."""
        names = ("num_samples", "changed", "skipped", "duplicates")
        query = """
            SELECT count(*) FILTER (WHERE reason IS NULL), count(*) FILTER (WHERE NOT original),
                   count(reason), count(sha256) - count(DISTINCT sha256) FROM done"""
        return dict(zip(names, self._row(query), strict=True))

    def class_counts(self, num_classes: int) -> tuple[int, ...]:
        """Images in the file, per class."""
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


def list_images(path: Path, where: str) -> tuple[Source, tuple[str, ...], list[tuple[int, Member]]]:
    """A folder or archive with its classes, and label and file of every image in a .beton's order.

    Args:
        where: the configuration key that names it, for errors.

    Raises:
        DataError: it does not exist, or has no images in classes.
    """
    try:
        source = open_source([path])
        with closing(Journal(None, {})) as journal:
            classes = journal.list_source(source).classes
            return source, classes, list(journal.members())
    except UserError as error:
        if error.where == "--source":
            raise DataError(where, error.expected, error.got) from None
        raise DataError(f"{where}: {error}") from None


def _check_file(path: Path | None) -> None:
    """Open and create a journal as SQLite would, whose own error does not say why it cannot."""
    if path is None:
        return
    try:
        if path.exists():
            open_regular(path).close()
    except OSError as error:
        raise damaged_journal(path, error.strerror) from None
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def _member(row: list[Any]) -> Member:
    category, name, file, *numbers = row
    return Member(os.fsdecode(category), os.fsdecode(name), os.fsdecode(file), *numbers)


def _digest(row: Iterable[object]) -> bytes:
    return hashlib.blake2b(repr(tuple(row)).encode(), digest_size=8).digest()
