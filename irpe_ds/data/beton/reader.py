"""Opening a .beton file: whether it is complete, and what it contains."""

import errno
import hashlib
import os
import socket
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.beton.format import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    ENTRY_TYPE,
    FIELDS,
    HEAD_BYTES,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    Reader,
)
from irpe_ds.data.beton.manifest import DatasetManifest, read_hashes, read_manifest
from irpe_ds.errors import DataError

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
    """Check a .beton file and return its contents; fast, since only its tables are hashed.

    A file that FFCV's own writer made, without our manifest, is accepted if its tables fit it.

    Args:
        where: the configuration key that names the file, for errors.

    Raises:
        DataError: the file is missing, truncated, incomplete, not FFCV's or has other fields.
    """
    try:
        size = path.stat().st_size
        manifest = read_manifest(path)
        if manifest is not None and manifest.size != size:
            expected = f"{manifest.size} bytes, as in the manifest of {path}"
            raise DataError(where, expected, f"{size} bytes")
        if manifest is not None:
            found = tables_sha256(path, manifest.num_samples)
            if found != manifest.tables_sha256:
                expected = f"the tables (labels, offsets, sizes) of {path} to match its manifest"
                raise DataError(where, expected, "different tables: damaged or changed")
        num_samples = _check_structure(path, size, where)
    except OSError as error:
        expected = "a .beton file (data_prep/convert.py makes one)"
        raise DataError(where, expected, f"{path}: {error.strerror}") from None
    classes = manifest.classes if manifest else None
    return DatasetInfo(path=path, num_samples=num_samples, classes=classes, manifest=manifest)


def read_beton(path: Path, where: str) -> Beton:
    """Open a .beton file to read its samples; arguments and errors as of `beton_info`."""
    info = beton_info(path, where)
    hashes = None
    if info.manifest is not None:
        prefixes = (int.from_bytes(h.sha256[:8], "big") for h in read_hashes(path, info.manifest))
        hashes = np.fromiter(prefixes, np.uint64, info.num_samples)
    reader = Reader(path)
    images, table = reader.metadata["f0"], reader.alloc_table
    entries = np.zeros(info.num_samples, ENTRY)
    for ours, theirs in (("start", "data_ptr"), ("height",) * 2, ("width",) * 2, ("mode",) * 2):
        entries[ours] = images[theirs]
    entries["label"] = reader.metadata["f1"]
    file = np.memmap(path, np.uint8, "r")
    samples = table["sample_id"].astype(np.int64)
    # Every sample has one allocation, at the offset in its entry, before the table.
    agrees = (
        np.array_equal(np.sort(samples), np.arange(info.num_samples))
        and np.array_equal(table["ptr"], images["data_ptr"][samples])
        and max(table["ptr"].max(), table["size"].max()) <= path.stat().st_size  # no overflow
        and (table["ptr"] + table["size"] <= reader.header["alloc_table_ptr"]).all()
        and (entries["height"] > 0).all()
        and (entries["width"] > 0).all()
    )
    if not agrees:
        raise DataError(where, "consistent tables", f"{path}: damaged")
    entries["bytes"][samples] = table["size"]
    checked = np.zeros(info.num_samples, np.bool_)
    return Beton(info=info, bytes=file, entries=entries, hashes=hashes, checked=checked)


def tables_sha256(path: Path, num_samples: int) -> str:
    """Hash of a file's header, metadata and allocation table."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(HEAD_BYTES + num_samples * ENTRY_TYPE.itemsize))
        file.seek(-num_samples * ALLOC_TABLE_TYPE.itemsize, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


def _check_structure(path: Path, size: int, where: str) -> int:
    """Check header, fields and allocation table; return the number of samples."""
    expected = f"a .beton file of FFCV (format {CURRENT_VERSION})"
    if size < HeaderType.itemsize:
        raise DataError(where, expected, f"{path}: {size} bytes")
    header = np.fromfile(path, HeaderType, count=1)[0]
    if header["version"] != CURRENT_VERSION:
        raise DataError(where, expected, f"{path}: another format")
    fields = np.fromfile(path, FieldDescType, len(FIELDS), offset=HeaderType.itemsize)
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
    return num_samples


def _name(field: np.void) -> str:
    return field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
