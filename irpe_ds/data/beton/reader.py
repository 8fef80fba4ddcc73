"""Opening a .beton file: whether it is complete, and what it contains."""

import errno
import hashlib
import os
import socket
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

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
    DatasetManifest,
    beside,
    read_hashes,
    read_manifest,
)
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular

ENTRY = np.dtype(
    [
        ("start", "<i8"),
        ("bytes", "<i8"),
        ("label", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("mode", "<i4"),
    ],
    align=True,
)
"""One sample: extent of its payload in the file, label, size in pixels, FFCV's image mode."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The contents of a data set."""

    path: Path
    """The file or folder."""
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
    """An open .beton file: memory-mapped, with its tables in memory."""

    info: DatasetInfo
    """Its contents in brief."""
    bytes: NDArray[np.uint8]
    """The whole file, memory-mapped."""
    entries: NDArray[np.void]
    """ENTRY of each sample."""
    hashes: NDArray[np.uint64] | None
    """First 64 bits of each sample's SHA-256, (num_samples,); None without a manifest."""
    checked: NDArray[np.bool_]
    """Samples already compared with their hash, (num_samples,)."""

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.info.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def payload(self, sample: int) -> NDArray[np.uint8]:
        """The stored bytes of a sample; errors as of `read_into`."""
        data = np.empty(self.entries["bytes"][sample], np.uint8)
        self.read_into(data, sample)
        return data

    def read_into(self, data: NDArray[np.uint8], sample: int) -> None:
        """Copy the stored bytes of a sample.

        Not from the mapping: where the file has been truncated, or its disk fails, that is SIGBUS.

        Raises:
            DataError: they cannot be read any more; names file and sample.
        """
        start, done = int(self.entries["start"][sample]), 0
        try:
            while done < len(data):
                some = os.preadv(self._descriptor, [data[done:].data], start + done)
                if some == 0:
                    size = os.fstat(self._descriptor).st_size
                    raise OSError(errno.EIO, f"it has {size} bytes: truncated after it was opened")
                done += some
        except OSError as error:
            expected = f"to read sample {sample} of {self.info.path}"
            raise DataError(socket.gethostname(), expected, error.strerror) from None

    def is_intact(self, sample: int) -> bool:
        """Whether a payload matches its hash; True if there is no hash."""
        if self.hashes is None:
            return True
        digest = hashlib.sha256(self.payload(sample).data).digest()
        return int.from_bytes(digest[:8], "big") == int(self.hashes[sample])


def beton_info(path: Path, where: str) -> DatasetInfo:
    """Check a .beton file and return its contents; fast, since only its tables are read.

    A file that FFCV's own writer made, without our manifest, is accepted if its tables fit it.

    Args:
        where: the configuration key that names the file, for errors.

    Raises:
        DataError: the file is missing, truncated, incomplete, not FFCV's or has other fields, or
            a sample has a label that is none or a size that no image has.
    """
    return _read_tables(path, where)[0]


def read_beton(path: Path, where: str) -> Beton:
    """Open a .beton file to read its samples; arguments and errors as of `beton_info`."""
    info, entries = _read_tables(path, where)
    hashes = None
    if info.manifest is not None:
        prefixes = (int.from_bytes(h.sha256[:8], "big") for h in read_hashes(path, info.manifest))
        hashes = np.fromiter(prefixes, np.uint64)
        if len(hashes) != info.num_samples:
            expected = f"{info.num_samples} lines, one for each image"
            raise DataError(beside(path, HASHES), expected, len(hashes))
    return Beton(
        info=info,
        bytes=np.memmap(path, np.uint8, "r"),
        entries=entries,
        hashes=hashes,
        checked=np.zeros(info.num_samples, np.bool_),
    )


def _read_tables(path: Path, where: str) -> tuple[DatasetInfo, NDArray[np.void]]:
    """The contents of a file in brief, and ENTRY of each sample."""
    if path.is_dir():
        expected = "a .beton file, or data.pipeline=timm, which reads folders"
        raise DataError(where, expected, f"{path}, a folder")
    try:
        with open_regular(path) as file:
            size, manifest = os.fstat(file.fileno()).st_size, read_manifest(path)
            if manifest is not None and manifest.size != size:
                wanted = f"{manifest.size} bytes, as in the manifest of {path}"
                raise DataError(where, wanted, f"{size} bytes")
            num_samples, allocations = check_structure(file, path, where)
            if manifest is not None and (
                num_samples != manifest.num_samples
                or tables_sha256(path, num_samples) != manifest.tables_sha256
            ):
                wanted = f"the tables (labels, offsets, sizes) of {path} to match its manifest"
                raise DataError(where, wanted, "different tables: damaged or changed")
            metadata = read_metadata(file, num_samples)
            file.seek(allocations)
            table = np.fromfile(file, ALLOC_TABLE_TYPE, num_samples)
    except OSError as error:
        expected = "a .beton file, or a folder with one folder per class"
        raise DataError(where, expected, f"{path}: {error.strerror}") from None
    entries = _entries(metadata, table, allocations, path, where)
    classes = manifest.classes if manifest else None
    _check_samples(entries, None if classes is None else len(classes), path, where)
    sample = int(entries["label"].argmax())
    info = DatasetInfo(
        path=path,
        num_samples=num_samples,
        classes=classes,
        manifest=manifest,
        largest_label=(int(entries["label"][sample]), sample),
    )
    return info, entries


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
