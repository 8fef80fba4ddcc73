"""Opening .beton files: whether they are complete, and what they contain."""

import errno
import hashlib
import os
import socket
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from mmap import PAGESIZE
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.beton.format import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    ENTRY_TYPE,
    FIELDS,
    HEAD_BYTES,
    JPG,
    MAX_PIXELS,
    RAW,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
)
from irpe_ds.data.beton.manifest import (
    HASHES,
    SHARDING,
    DatasetManifest,
    FileRecord,
    beside,
    hash_prefixes,
    read_manifest,
)
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 8  # that open the shards of a data set

ENTRY = np.dtype(
    [
        ("start", "<i8"),
        ("bytes", "<i8"),
        ("label", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("mode", "<i4"),
        ("file", "<i4"),
    ],
    align=True,
)
"""One sample: extent of its payload in its file, label, size in pixels, FFCV's image mode, and the
number of its file among the shards of its data set."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The contents of a data set."""

    path: Path
    """The file or folder, or the name of a sharded data set."""
    num_samples: int
    """Number of images."""
    classes: tuple[str, ...] | None
    """Class names in label order. None: unknown, since the file has no manifest."""
    manifest: DatasetManifest | None = None
    """The record of its conversion, if there is one."""
    largest_label: tuple[int, int] | None = None
    """The largest label and the first sample that has it, of a .beton file."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if known."""
        return None if self.classes is None else len(self.classes)


@dataclass(frozen=True, kw_only=True)
class Beton:
    """An open .beton file, or a sharded data set of several, with their tables in memory."""

    info: DatasetInfo
    """Its contents in brief."""
    files: tuple[Path, ...]
    """The files; `entries["file"]` says in which of them a sample is."""
    entries: NDArray[np.void]
    """ENTRY of each sample."""
    hashes: NDArray[np.uint64] | None
    """First 64 bits of each sample's SHA-256, (num_samples,); None without a manifest."""
    checked: NDArray[np.bool_]
    """Samples already compared with their hash, (num_samples,)."""

    @cached_property
    def _descriptors(self) -> list[int]:
        descriptors = list[int]()
        weakref.finalize(self, _close, descriptors)
        descriptors += (os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self.files)
        return descriptors

    def payload(self, sample: int) -> NDArray[np.uint8]:
        """The stored bytes of a sample; errors as of `read_into`."""
        data = np.empty(self.entries["bytes"][sample], np.uint8)
        self.read_into(data, sample)
        return data

    def read_into(self, data: NDArray[np.uint8], sample: int) -> None:
        """Copy the stored bytes of a sample; errors as of `read_run`."""
        self.read_run(np.array([sample]), [data])

    def extents(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the file, first byte and number of bytes of each sample, (3, samples)."""
        entries = self.entries[samples]
        return np.stack([entries[name].astype(np.int64) for name in ("file", "start", "bytes")])

    def read_run(self, samples: NDArray[np.int64], parts: Sequence[NDArray[np.uint8]]) -> None:
        """Copy the stored bytes of samples that follow one another in a file, in one request.

        What lies between them is read too, and dropped. The file is not mapped: where it has been
        truncated, or its disk fails, that would be SIGBUS.

        Raises:
            DataError: they cannot be read any more; names file and sample.
        """
        file, starts, sizes = self.extents(samples).tolist()
        views = list[memoryview]()
        at = end = starts[0]
        for part, start, size in zip(parts, starts, sizes, strict=True):
            if start > end:
                views.append(memoryview(bytearray(start - end)))
            views.append(part.data)
            end = start + size
        try:
            descriptor = self._descriptors[file[0]]
            while views:
                some = os.preadv(descriptor, views, at)
                if some == 0:
                    size = os.fstat(descriptor).st_size
                    raise OSError(errno.EIO, f"it has {size} bytes: truncated after it was opened")
                at += some
                while views and some >= len(views[0]):
                    some -= len(views.pop(0))
                if some:
                    views[0] = views[0][some:]
        except OSError as error:
            sample = samples[np.searchsorted(starts, at, "right") - 1]
            inside = f" (in {self.files[file[0]].name})" if len(self.files) > 1 else ""
            expected = f"to read sample {sample} of {self.info.path}{inside}"
            raise DataError(socket.gethostname(), expected, error.strerror) from None

    def disable_readahead(self) -> None:
        """Have the system read what is asked for and no more."""
        for descriptor in self._descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def forget(self, samples: NDArray[np.int64]) -> None:
        """Drop samples that follow one another in a file from the system's page cache."""
        file, starts, sizes = self.extents(samples)
        begin = int(starts[0]) // PAGESIZE * PAGESIZE  # the system leaves parts of pages
        size = -(-int(starts[-1] + sizes[-1] - begin) // PAGESIZE) * PAGESIZE
        os.posix_fadvise(self._descriptors[file[0]], begin, size, os.POSIX_FADV_DONTNEED)

    def is_intact(self, sample: int, payload: NDArray[np.uint8]) -> bool:
        """Whether a payload matches the sample's hash; True if there is no hash."""
        if self.hashes is None:
            return True
        digest = hashlib.sha256(payload.data).digest()
        return int.from_bytes(digest[:8], "big") == int(self.hashes[sample])


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def beton_info(path: Path, where: str) -> DatasetInfo:
    """Check a data set and return its contents; fast, since only tables are read.

    A file that FFCV's own writer made, without our manifest, is accepted if its tables fit it.

    Args:
        path: a .beton file, or the name of a sharded data set, of which only the index and the
            shards exist.
        where: the configuration key that names it, for errors.

    Raises:
        DataError: a file is missing, truncated, incomplete, not FFCV's or has other fields, or
            a sample has a label that is none or a size that no image has.
    """
    return _read_tables(path, where)[0]


def read_beton(path: Path, where: str) -> Beton:
    """Open a data set to read its samples; arguments and errors as of `beton_info`."""
    info, entries = _read_tables(path, where)
    hashes, files = None, [path]
    if info.manifest is not None:
        records = info.manifest.files(path)
        files = [file for file, _ in records]
        hashes = np.concatenate(list(_in_threads(_prefixes, records)))
    return Beton(
        info=info,
        files=tuple(files),
        entries=entries,
        hashes=hashes,
        checked=np.zeros(info.num_samples, np.bool_),
    )


def _prefixes(file: tuple[Path, FileRecord]) -> NDArray[np.uint64]:
    path, record = file
    found = hash_prefixes(path, record.hashes_sha256)
    if len(found) != record.num_samples:
        expected = f"{record.num_samples} lines, one for each image"
        raise DataError(beside(path, HASHES), expected, len(found))
    return found


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results in order; hashing and reading release the GIL."""
    with ThreadPoolExecutor(min(len(items), _THREADS)) as pool:
        yield from pool.map(function, items)


def _read_tables(path: Path, where: str) -> tuple[DatasetInfo, NDArray[np.void]]:
    """The contents of a data set in brief, and ENTRY of each sample."""
    if path.is_dir():
        expected = "a .beton file, or data.pipeline=timm, which reads folders"
        raise DataError(where, expected, f"{path}, a folder")
    manifest = read_manifest(path)
    if manifest is None and beside(path, SHARDING).is_dir():
        expected = "a complete .beton file"
        raise DataError(where, expected, f"{path}: the conversion of its shards is unfinished")
    files = manifest.files(path) if manifest is not None else [(path, None)]
    missing = [file for file, _ in files if not file.exists()]
    if manifest is not None and manifest.shards and missing:
        expected = f"the {len(files)} shards of {path}"
        raise DataError(where, expected, f"{len(missing)} missing, such as {missing[0]}")
    parts = list(_in_threads(lambda file: _read_file(*file, where), files))
    for number, part in enumerate(parts):
        part["file"] = number
    entries = np.concatenate(parts) if len(parts) > 1 else parts[0]
    classes = manifest.classes if manifest else None
    _check_samples(entries, None if classes is None else len(classes), path, where)
    sample = int(entries["label"].argmax())
    info = DatasetInfo(
        path=path,
        num_samples=len(entries),
        classes=classes,
        manifest=manifest,
        largest_label=(int(entries["label"][sample]), sample),
    )
    return info, entries


def _read_file(path: Path, record: FileRecord | None, where: str) -> NDArray[np.void]:
    """ENTRY of each sample of one file, which is that of its record, if it has one."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if record is not None and record.size != size:
                wanted = f"{record.size} bytes, as in the manifest of {path}"
                raise DataError(where, wanted, f"{size} bytes")
            num_samples, allocations = check_structure(file, path, where)
            if record is not None and (
                num_samples != record.num_samples
                or tables_sha256(path, num_samples) != record.tables_sha256
            ):
                wanted = f"the tables (labels, offsets, sizes) of {path} to match its manifest"
                raise DataError(where, wanted, "different tables: damaged or changed")
            metadata = read_metadata(file, num_samples)
            file.seek(allocations)
            table = np.fromfile(file, ALLOC_TABLE_TYPE, num_samples)
    except OSError as error:
        expected = "a .beton file, or a folder with one folder per class"
        raise DataError(where, expected, f"{path}: {error.strerror}") from None
    return _entries(metadata, table, allocations, path, where)


def _entries(
    metadata: NDArray[np.void],
    table: NDArray[np.void],
    allocations: int,
    path: Path,
    where: str,
) -> NDArray[np.void]:
    """ENTRY of each sample, from the two tables."""
    images, count = metadata["f0"], len(metadata)
    samples = table["sample_id"].astype(np.int64)
    # Every sample has one allocation, at the offset in its entry, before the table.
    agrees = (
        len(table) == count
        and np.array_equal(np.sort(samples), np.arange(count))
        and np.array_equal(table["ptr"], images["data_ptr"][samples])
        and max(table["ptr"].max(), table["size"].max()) <= allocations  # no overflow
        and (table["ptr"] + table["size"] <= allocations).all()
        and table["ptr"].min() >= HEAD_BYTES + metadata.nbytes
    )
    if not agrees:
        raise DataError(where, "consistent tables", f"{path}: damaged")
    entries = np.zeros(count, ENTRY)
    for ours, theirs in (("start", "data_ptr"), ("height",) * 2, ("width",) * 2, ("mode",) * 2):
        entries[ours] = images[theirs]
    entries["label"] = metadata["f1"]
    entries["bytes"][samples] = table["size"]
    return entries


def _check_samples(
    entries: NDArray[np.void], num_classes: int | None, path: Path, where: str
) -> None:
    """Refuse labels outside of [0, num_classes), and sizes that would take too much memory."""
    labels, bytes_ = entries["label"], entries["bytes"]
    wrong = labels < 0
    expected = "labels from 0"
    if num_classes is not None:
        wrong |= labels >= num_classes
        expected = f"labels from 0 to {num_classes - 1}, as its manifest has {num_classes} classes"
    if wrong.any():
        sample = int(wrong.argmax())
        raise DataError(where, expected, f"label {labels[sample]} in sample {sample} of {path}")
    pixels = entries["height"].astype(np.int64) * entries["width"]
    jpeg, raw = entries["mode"] == JPG, entries["mode"] == RAW
    wrong = (pixels < 1) | (pixels > MAX_PIXELS) | (bytes_ < 1) | ~(jpeg | raw)
    wrong |= raw & (bytes_ != 3 * pixels)
    if wrong.any():
        sample = int(wrong.argmax())
        entry = entries[sample]
        size = f"{entry['height']} x {entry['width']} pixels in {entry['bytes']} bytes"
        got = f"{size} (mode {entry['mode']}) in sample {sample} of {path}"
        expected = f"images of 1 to {MAX_PIXELS} pixels, JPEG or 3 bytes each"
        raise DataError(where, expected, got)


def tables_sha256(path: Path, num_samples: int) -> str:
    """Hash of a file's header, metadata and allocation table."""
    with open_regular(path) as file:
        digest = hashlib.sha256(file.read(HEAD_BYTES + num_samples * ENTRY_TYPE.itemsize))
        file.seek(-num_samples * ALLOC_TABLE_TYPE.itemsize, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


def check_structure(file: BinaryIO, path: Path, where: str) -> tuple[int, int]:
    """Check header, fields and the size of a file; where the payloads end.

    Returns:
        The number of samples, and where the allocation table begins.
    """
    expected = f"a .beton file of FFCV (format {CURRENT_VERSION})"
    size = os.fstat(file.fileno()).st_size
    if size < HEAD_BYTES:
        raise DataError(where, expected, f"{path}: {size} bytes")
    file.seek(0)
    header = np.fromfile(file, HeaderType, count=1)[0]
    if header["version"] != CURRENT_VERSION:
        raise DataError(where, expected, f"{path}: another format")
    fields = np.fromfile(file, FieldDescType, len(FIELDS))
    found = {_name(field): TYPE_ID_HANDLER.get(int(field["type_id"])) for field in fields}
    if header["num_fields"] != len(FIELDS) or list(found.items()) != list(FIELDS.items()):
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in FIELDS.items())
        raise DataError(where, f"a .beton file with the fields {wanted}", f"{path}: other fields")
    num_samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if num_samples == 0 or table < HEAD_BYTES + num_samples * ENTRY_TYPE.itemsize:
        raise DataError(where, "a complete .beton file", f"{path}: no images, or unfinished")
    wanted_size = table + num_samples * ALLOC_TABLE_TYPE.itemsize  # one allocation per image
    if size != wanted_size:
        got = f"{size}: the file is truncated" if size < wanted_size else size
        raise DataError(where, f"{path} to have {wanted_size} bytes", got)
    return num_samples, table


def read_metadata(file: BinaryIO, num_samples: int) -> NDArray[np.void]:
    """ENTRY_TYPE of each sample."""
    file.seek(HEAD_BYTES)
    return np.fromfile(file, ENTRY_TYPE, num_samples)


def _name(field: np.void) -> str:
    return field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
