"""Opening a .beton file: is it there, is it whole, what is in it."""

import hashlib
import os
from dataclasses import dataclass
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
from irpe_ds.data.beton.manifest import Manifest, read_hashes, read_manifest
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
"""One sample: where its bytes are, its label, its size in pixels, FFCV's image mode."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a set of images holds."""

    path: Path
    """The file or folder."""
    num_samples: int
    """Images in it."""
    classes: tuple[str, ...] | None
    """Class names in label order. None: the file has no manifest, so they are unknown."""
    manifest: Manifest | None = None
    """What was recorded of it."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, where it is known."""
        return None if self.classes is None else len(self.classes)


@dataclass(frozen=True, kw_only=True)
class Beton:
    """A .beton file in memory: the bytes mapped, the tables read."""

    info: DatasetInfo
    """What it holds."""
    bytes: NDArray[np.uint8]
    """Its contents."""
    entries: NDArray[np.void]
    """ENTRY of each sample."""
    hashes: NDArray[np.uint64] | None
    """First 64 bits of each sample's SHA-256, (num_samples,); None without a manifest."""
    compared: NDArray[np.bool_]
    """Samples that have been compared with their hash, (num_samples,)."""

    def payload(self, sample: int) -> NDArray[np.uint8]:
        """The stored bytes of a sample."""
        entry = self.entries[sample]
        return self.bytes[entry["start"] : entry["start"] + entry["bytes"]]

    def is_whole(self, sample: int) -> bool:
        """Whether these bytes are those that were converted, as far as that is known."""
        if self.hashes is None:
            return True
        digest = hashlib.sha256(self.payload(sample).data).digest()
        return int.from_bytes(digest[:8], "big") == int(self.hashes[sample])


def open_dataset(path: Path, where: str) -> DatasetInfo:
    """Check a .beton file and say what it holds; takes moments, since only its tables are hashed.

    A file that FFCV itself wrote, without our manifest, will do if its own tables agree with it.

    Args:
        path: the file.
        where: the configuration key that names it, for the error.

    Raises:
        DataError: it is missing, cut short, unfinished, not FFCV's or has other fields.
    """
    try:
        size = path.stat().st_size
        manifest = read_manifest(path)
        if manifest is not None and manifest.size != size:
            expected = f"the {manifest.size} bytes that the manifest of {path} says"
            raise DataError(where, expected, f"{size} bytes")
        if manifest is not None:
            found = tables_sha256(path, manifest.num_samples)
            if found != manifest.tables_sha256:
                expected = f"the tables (labels, places, sizes) that the manifest of {path} says"
                raise DataError(where, expected, "others: it is damaged or was changed")
        num_samples = _check_structure(path, size, where)
    except OSError as error:
        expected = "a .beton file (data_prep/convert.py makes one)"
        raise DataError(where, expected, f"{path}: {error.strerror}") from None
    classes = manifest.classes if manifest else None
    return DatasetInfo(path=path, num_samples=num_samples, classes=classes, manifest=manifest)


def read_beton(path: Path, where: str) -> Beton:
    """Open a .beton file for reading its samples; the arguments and errors of `open_dataset`."""
    info = open_dataset(path, where)
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
    # Every sample has one allocation, where its entry says, before the table.
    agrees = (
        np.array_equal(np.sort(samples), np.arange(info.num_samples))
        and np.array_equal(table["ptr"], images["data_ptr"][samples])
        and max(table["ptr"].max(), table["size"].max()) <= path.stat().st_size  # no overflow
        and (table["ptr"] + table["size"] <= reader.header["alloc_table_ptr"]).all()
        and (entries["height"] > 0).all()
        and (entries["width"] > 0).all()
    )
    if not agrees:
        raise DataError(where, "tables that agree with each other", f"{path}: damaged")
    entries["bytes"][samples] = table["size"]
    compared = np.zeros(info.num_samples, np.bool_)
    return Beton(info=info, bytes=file, entries=entries, hashes=hashes, compared=compared)


def tables_sha256(path: Path, num_samples: int) -> str:
    """Hash of the header, the metadata and the allocation table of a file with so many samples."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(HEAD_BYTES + num_samples * ENTRY_TYPE.itemsize))
        file.seek(-num_samples * ALLOC_TABLE_TYPE.itemsize, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


def _check_structure(path: Path, size: int, where: str) -> int:
    """Number of samples, after a look at the header, the fields and the allocation table."""
    expected = f"a .beton file of FFCV (format {CURRENT_VERSION})"
    if size < HeaderType.itemsize:
        raise DataError(where, expected, f"{path}: {size} bytes")
    header = np.fromfile(path, HeaderType, count=1)[0]
    if header["version"] != CURRENT_VERSION:
        raise DataError(where, expected, f"{path}: something else")
    fields = np.fromfile(path, FieldDescType, len(FIELDS), offset=HeaderType.itemsize)
    found = {_name(field): TYPE_ID_HANDLER.get(int(field["type_id"])) for field in fields}
    if header["num_fields"] != len(FIELDS) or list(found.items()) != list(FIELDS.items()):
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in FIELDS.items())
        raise DataError(where, f"a .beton file with the fields {wanted}", f"{path}: others")
    num_samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if num_samples == 0 or table < HEAD_BYTES + num_samples * ENTRY_TYPE.itemsize:
        raise DataError(where, "a .beton file with images in it", f"{path}: an unfinished file")
    wanted_size = table + num_samples * ALLOC_TABLE_TYPE.itemsize  # one allocation per image
    if size != wanted_size:
        got = f"{size}: it was cut short" if size < wanted_size else size
        raise DataError(where, f"{path} to have {wanted_size} bytes", got)
    return num_samples


def _name(field: np.void) -> str:
    return field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
