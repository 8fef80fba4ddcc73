"""Parquet files with a column of images and one of labels, as on the Hugging Face Hub."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irpe_ds.data.beton.options import SourceOptions
from irpe_ds.data.beton.sources.shards import LABEL
from irpe_ds.data.beton.sources.source import Source, SourceFile, is_image
from irpe_ds.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE = "image"
"""The column of images unless --image-key names another."""

_COMPLETE = "a complete Parquet file"
_NAMES = b"huggingface"  # key of the schema's metadata with the names of the classes
_ROWS = 1 << 12  # listed at a time
_GROUPS = 4  # row groups in memory: those of a sorted file are read once

Groups = OrderedDict[tuple[str, int], "pyarrow.ChunkedArray"]
"""The images of row groups, by file and number, in the order of their last use."""


class Parquet(Source):
    """Rows with an image, as bytes or as a struct of `bytes` and `path`, and a label."""

    kind = "Parquet files"
    tells_sizes = False

    def __init__(self, paths: Sequence[Path], options: SourceOptions) -> None:
        super().__init__(paths, options)
        self.has_labels = options.labels is None
        self._image, self._label = options.image_key or IMAGE, options.label_key or LABEL
        self._groups: Groups = OrderedDict()
        with _opened(self.path) as file:
            metadata = file.schema_arrow.metadata or {}
        self.names = _class_names(metadata, self._label) if self.has_labels else None

    def files(self) -> Iterator[SourceFile]:
        for path in self.archives:
            with _opened(path) as file:
                yield from self._rows(file, path)

    def _rows(self, file: "pyarrow.parquet.ParquetFile", path: Path) -> Iterator[SourceFile]:
        columns = self._columns(file, path)
        place, stamp, number = _leaf(file, self._image), path.stat().st_mtime_ns, 0
        for group in range(file.num_row_groups):
            column = file.metadata.row_group(group).column(place)
            size = column.total_uncompressed_size // max(1, column.num_values)
            missing = _missing(file, group, column)
            batches = file.iter_batches(
                _ROWS, row_groups=[group], columns=columns, use_threads=False
            )
            for row, values in enumerate(row for batch in batches for row in batch.to_pylist()):
                number += 1
                name = values[self._image]["path"] if values.get(self._image) else None
                if not name or not is_image(name):
                    name = f"{path.stem}/{number:09d}.jpg"
                label = None
                if row in missing:  # img2dataset: it could not be downloaded
                    name = f"{path.stem}/{number:09d}.missing"
                elif self.has_labels:
                    label = self._text(values[self._label], f"{path}: row {number}")
                yield SourceFile(name, os.fspath(path), number, size, stamp, label)

    def _columns(self, file: "pyarrow.parquet.ParquetFile", path: Path) -> list[str]:
        """What is read to list rows, after checking that it is there."""
        names = file.schema_arrow.names
        wanted = [(self._image, "--image-key")] + [(self._label, "--label-key")] * self.has_labels
        for name, option in wanted:
            if name not in names:
                expected = f"the name of a column of {path}: {', '.join(names)}"
                raise DataError(option, expected, name)
        found = [self._label] if self.has_labels else []
        leaves = [file.schema.column(n).path for n in range(len(file.schema))]
        return found + [leaf for leaf in (f"{self._image}.path",) if leaf in leaves]

    def _text(self, value: object, where: str) -> str:
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise DataError(where, "a number or a name as label (--label-key)", value)
        return str(value).strip()

    def reader(self, path: str) -> "ParquetReader":
        return ParquetReader(path, self._image, self._groups)


class ParquetReader:
    """Images of a file by their rows, from 1; reads whole row groups."""

    def __init__(self, path: str, image: str, groups: Groups) -> None:
        self._path, self._image, self._groups = path, image, groups

    @cached_property
    def _metadata(self) -> "pyarrow.parquet.FileMetaData":
        with _opened(Path(self._path)) as file:
            return file.metadata

    @cached_property
    def _ends(self) -> list[int]:
        """The number of rows up to the end of each row group."""
        groups = range(self._metadata.num_row_groups)
        return list(accumulate(self._metadata.row_group(n).num_rows for n in groups))

    def read(self, offset: int, size: int) -> bytes:
        """The image in a row."""
        group = bisect_right(self._ends, offset - 1)
        images = self._groups.get((self._path, group))
        if images is None:
            images = self._read_group(group)
            self._groups[self._path, group] = images
            while len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        value = images[offset - 1 - (self._ends[group] - len(images))].as_py()
        value = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError("a row without the bytes of an image")
        return value

    def _read_group(self, group: int) -> "pyarrow.ChunkedArray":
        import pyarrow.parquet

        try:
            # One reader for each call: it is not said that threads may share them.
            with pyarrow.parquet.ParquetFile(self._path, metadata=self._metadata) as file:
                leaf = file.schema.column(_leaf(file, self._image)).path
                return file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
        except (OSError, pyarrow.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"damaged Parquet: {error}") from None


def _leaf(file: "pyarrow.parquet.ParquetFile", image: str) -> int:
    """The number of the column with the bytes of images."""
    leaves = [file.schema.column(n).path for n in range(len(file.schema))]
    for name in (image, f"{image}.bytes"):
        if name in leaves:
            return leaves.index(name)
    raise DataError("--image-key", "a column of bytes, or of `bytes` and `path`", image)


def _missing(file: "pyarrow.parquet.ParquetFile", group: int, column: Any) -> set[int]:
    """The rows of a row group without an image; mostly its statistics tell that there are none."""
    if column.statistics is not None and column.statistics.null_count == 0:
        return set()
    images = file.read_row_group(group, columns=[column.path_in_schema], use_threads=False)
    values = images.column(0)
    if values.type.num_fields:
        values = values.combine_chunks().field(0)
    return {row for row, valid in enumerate(values.is_valid().to_pylist()) if not valid}


@contextmanager
def _opened(path: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """An open file; what pyarrow says of a damaged one becomes a DataError."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except DataError:
        raise
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(path, _COMPLETE, error) from None


def _class_names(metadata: Mapping[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """The names of a column's classes that the `datasets` library has stored with the schema."""
    try:
        features = json.loads(metadata[_NAMES])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
