"""The contents and origin of a .beton file, in files beside it.

FILE.beton.json is the manifest. FILE.beton.sha256 has a line per sample, `hash  class/name`, in
sha256sum's format: in the source folder, `sha256sum -c` compares it with images stored as they
are. FILE.beton.skipped lists the images that the conversion left out, with the reasons.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from irpe_ds.data.parallel import progress
from irpe_ds.errors import DataError
from irpe_ds.files import replace_file

FORMAT = 2
MANIFEST = ".json"
HASHES = ".sha256"
SKIPPED = ".skipped"

_CHUNK_BYTES = 1 << 22
_ESCAPES = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Contents and origin of one .beton file."""

    format: int = FORMAT
    """Version of the manifest's format."""
    source: list[str]
    """Folder or archives that the images came from, as given."""
    kind: str
    """Kind of source, in words."""
    options: dict[str, Any]
    """The options of the conversion."""
    num_samples: int
    """Images in the file."""
    changed: int
    """Images not stored as the bytes of their source file."""
    skipped: int
    """Images that could not be stored; FILE.beton.skipped lists them."""
    duplicates: int
    """Images whose payload is also that of another image."""
    left_out: int
    """Source files without an image extension."""
    classes: tuple[str, ...]
    """Class names in label order."""
    class_counts: tuple[int, ...]
    """Images of each class."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Hash of the file."""
    tables_sha256: str
    """Hash of its tables: header, metadata and allocation table."""
    hashes_sha256: str
    """Hash of FILE.beton.sha256."""
    ffcv: str
    """Version of FFCV that converted."""
    command: str
    """Command that converted."""

    def write(self, path: Path) -> None:
        """Write to `path`, atomically."""
        replace_file(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "DatasetManifest":
        """Read a manifest.

        Raises:
            FileNotFoundError: there is none.
            DataError: it is unreadable or malformed.
        """
        expected = "a manifest written by data_prep/convert.py"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise DataError(path, f"a manifest of format {FORMAT}", values["format"])
            lists = {name: tuple(values[name]) for name in ("classes", "class_counts")}
            return cls(**values | lists)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(path, "a readable file", error.strerror) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise DataError(path, expected, "a malformed file") from None


def read_manifest(beton: Path) -> DatasetManifest | None:
    """The manifest of a .beton file, or None if it has none.

    Raises:
        DataError: it is unreadable or malformed.
    """
    try:
        return DatasetManifest.read(beside(beton, MANIFEST))
    except FileNotFoundError:
        return None


def beside(path: Path, suffix: str) -> Path:
    """The path with this suffix appended to its name."""
    return path.with_name(path.name + suffix)


def file_sha256(path: Path, show: str | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `show` is the title of a progress bar. None: no bar."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(show, path.stat().st_size, unit="B") as bar:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


class SampleHash(NamedTuple):
    """A line of FILE.beton.sha256."""

    sha256: bytes
    """Hash of the sample's payload."""
    name: str
    """class/name of the image."""


def hash_line(sha256: bytes, name: str) -> bytes:
    """A line in sha256sum's format, which starts with a backslash if the name has escapes."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    return f"{mark}{sha256.hex()}  ".encode() + os.fsencode(escaped) + b"\n"


def read_hashes(beton: Path, manifest: DatasetManifest) -> Iterator[SampleHash]:
    """The line of every sample, in order.

    Raises:
        DataError: the file of hashes is not the one of the manifest.
    """
    path = beside(beton, HASHES)
    try:
        if file_sha256(path) != manifest.hashes_sha256:
            raise DataError(path, "the file of hashes in the manifest", "another one")
        with path.open("rb") as file:
            for line in file:
                text = line.lstrip(b"\\")
                name = text[66:-1]
                if text != line:
                    name = re.sub(rb"\\(.)", lambda found: _ESCAPES[found[1]], name)
                yield SampleHash(bytes.fromhex(text[:64].decode()), os.fsdecode(name))
    except OSError as error:
        raise DataError(path, "the file of sample hashes", error.strerror) from None
