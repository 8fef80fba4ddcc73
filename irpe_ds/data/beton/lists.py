"""Lists of images, with their labels or alone, in the forms that data sets come with."""

import csv
import io
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from irpe_ds.data.beton.sources.source import EXTENSIONS
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular

_LOOK = 20  # lines that tell the form
_ENDINGS = "|".join(sorted(ending[1:] for ending in EXTENSIONS))
_IMAGE = re.compile(rf"(.*?\.(?:{_ENDINGS}))", re.IGNORECASE)
_SPACED = re.compile(rf"(.*?\.(?:{_ENDINGS}))(?:\s+(.*))?", re.IGNORECASE)  # caffe: name 65


class Line(NamedTuple):
    """An image of a list."""

    name: str
    """Its file name, or more or less of its path, with or without an extension; empty: the line has
    none, and stands for the next image."""
    label: str
    """Its label; empty: none."""


def read_list(
    path: Path, option: str, image_key: str | None = None, label_key: str | None = None
) -> Iterator[Line]:
    """The lines of a list.

    Forms: `name label` (caffe); the two separated by a tab (Tiny-ImageNet) or a comma, with a
    header or without (Kaggle); names alone; labels alone.

    Args:
        option: the option that names it, for errors.
        image_key, label_key: names of columns, in the header of a table. None: the first, and the
            one after the names.

    Raises:
        DataError: it is empty or no text, or has no such column.
    """
    expected = "a text file with an image or a label per line"
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            first = list(islice(filter(str.strip, text), _LOOK))
            if not first:
                raise DataError(option, expected, f"{path}: empty")
            text.seek(0)
            separator = _separator(path, first)
            if separator is None:
                yield from _lines(text, names=any(map(_SPACED.fullmatch, map(str.strip, first))))
                return
            rows = csv.reader(text, delimiter=separator)
            yield from _rows(rows, path, option, image_key, label_key)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(option, expected, f"{path}: {reason}") from None


def _separator(path: Path, first: list[str]) -> str | None:
    """What separates the columns; None: spaces, if there are columns at all."""
    if all("\t" in line for line in first):
        return "\t"
    begin_with_name = all(_IMAGE.fullmatch(line.partition(",")[0].strip()) for line in first[-1:])
    if all("," in line for line in first) and (path.suffix == ".csv" or begin_with_name):
        return ","
    return None


def _lines(text: Iterator[str], *, names: bool) -> Iterator[Line]:
    """Lines with a name and a label, or a label alone."""
    for line in filter(None, map(str.strip, text)):
        found = _SPACED.fullmatch(line)
        name, label = (found[1], found[2]) if found else (line.split()[0], line.partition(" ")[2])
        yield Line(name, label or "") if names else Line("", line)


def _rows(
    rows: Iterator[list[str]], path: Path, option: str, image_key: str | None, label_key: str | None
) -> Iterator[Line]:
    """Lines of a table; its header, if it has one, names no image."""
    places: tuple[int, int] | None = None
    for row in rows:
        row = [cell.strip() for cell in row]
        if not any(row):
            continue
        if places is None:
            for key, key_option in ((image_key, "--image-key"), (label_key, "--label-key")):
                if key is not None and key not in row:
                    raise DataError(key_option, f"a column of {path}: {', '.join(row)}", key)
            image = row.index(image_key) if image_key is not None else 0
            label = row.index(label_key) if label_key is not None else image + 1
            places = image, label
        if max(places) >= len(row):
            expected = f"{max(places) + 1} columns or more in {path}"
            raise DataError(option, expected, ", ".join(row))
        yield Line(row[places[0]], row[places[1]])


class ImageList:
    """Finds images in a list by as much of their paths as both have.

    Args:
        db: the table is made here, temporarily.
        path: names the list in errors.

    Raises:
        DataError: the list has an image twice, with different labels.
    """

    def __init__(
        self, db: sqlite3.Connection, table: str, path: Path, lines: Iterable[Line]
    ) -> None:
        self._db, self._table, self._path, self._option = db, table, path, f"--{table}"
        db.execute(
            f"CREATE TEMP TABLE {table} ("
            "key BLOB PRIMARY KEY, label BLOB, number INTEGER, image BLOB) WITHOUT ROWID"
        )
        insert = f"INSERT INTO {table} VALUES (?, ?, ?, NULL) ON CONFLICT DO NOTHING"
        for number, line in enumerate(lines):
            key, label = _key(line.name), os.fsencode(line.label)
            if db.execute(insert, (key, label, number)).rowcount:
                continue
            query = f"SELECT label FROM {table} WHERE key = ?"
            if db.execute(query, (key,)).fetchone() != (label,):
                raise DataError(self._option, f"one label for each image in {path}", line.name)

    def find(self, image: str) -> str | None:
        """The label of an image; None if it is not in the list.

        Raises:
            DataError: several lines are of this image, or the line is another's too.
        """
        row = self._longest(image) or self._longer(image)
        if row is None:
            return None
        key, label, other = row
        if other is not None:
            expected = f"more of the path in {self._path} to tell two images apart"
            raise DataError(self._option, expected, f"{os.fsdecode(other)} and {image}")
        update = f"UPDATE {self._table} SET image = ? WHERE key = ?"
        self._db.execute(update, (os.fsencode(image), key))
        return os.fsdecode(label)

    def _longest(self, image: str) -> tuple[bytes, bytes, bytes | None] | None:
        """The line with the end of a path that is longest."""
        keys, place = list[bytes](), 0
        for variant in (_key(image), _key(os.path.splitext(image)[0])):
            place = 0
            while (place := variant.find(b"/", place) + 1) > 0:
                keys.append(variant[:place])
        marks = ", ".join("?" * len(keys))
        query = f"SELECT key, label, image FROM {self._table} WHERE key IN ({marks})"
        return max(self._db.execute(query, keys), key=lambda row: len(row[0]), default=None)

    def _longer(self, image: str) -> tuple[bytes, bytes, bytes | None] | None:
        """The line with a path that ends as a path does."""
        query = f"SELECT key, label, image FROM {self._table} WHERE key >= ? AND key < ? LIMIT 2"
        for key in (_key(image), _key(os.path.splitext(image)[0])):
            rows = self._db.execute(query, (key, key[:-1] + b"0")).fetchall()  # "0" follows "/"
            if len(rows) == 2:
                expected = f"one line for {image} in {self._path}"
                raise DataError(self._option, expected, "several")
            if rows:
                return rows[0]
        return None

    def count_unused(self) -> int:
        """Lines that no image was found in, but for the first, which may be a header."""
        query = f"SELECT count(*) FROM {self._table} WHERE image IS NULL AND number > 0"
        return int(self._db.execute(query).fetchone()[0])

    def unused(self) -> str | None:
        """The path in one of these lines."""
        query = f"SELECT key FROM {self._table} WHERE image IS NULL AND number > 0 LIMIT 1"
        row = self._db.execute(query).fetchone()
        return None if row is None else "/".join(reversed(os.fsdecode(row[0]).split("/")[:-1]))


def _key(path: str) -> bytes:
    """The parts of a path from last to first: what shares an end of the path then lies together."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return os.fsencode("".join(f"{part}/" for part in reversed(parts)))
