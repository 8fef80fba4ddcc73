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
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field

from irpe_ds.config_types import Count, Natural
from irpe_ds.data.parallel import progress
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular, read_regular, replace_file
from irpe_ds.schema import parse_json

FORMAT: Final = 3
MANIFEST = ".json"
HASHES = ".sha256"
SKIPPED = ".skipped"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""64 hexadecimal digits"""

_CHUNK_BYTES = 1 << 22
_MANIFEST_BYTES = 1 << 24  # 100,000 classes need 3 MB
_LINE = re.compile(rb"\\[0-9a-f]{64}  (?:[^\\\n]|\\[\\nr])+\n|[0-9a-f]{64}  [^\\\n]+\n")
_LINE_BYTES = 1 << 14  # a path has up to 4,096, and each may be escaped
_ESCAPES = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Contents and origin of one .beton file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal[2, 3] = FORMAT
    """Version of the manifest's format."""
    source: list[str]
    """Folder or archives that the images came from, as given."""
    kind: str
    """Kind of source, in words."""
    options: dict[str, Any]
    """The options of the conversion: how images are stored."""
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Those that chose images and classes, where they are not the defaults; from format 3 on."""
    num_samples: Count
    """Images in the file."""
    changed: Natural
    """Images not stored as the bytes of their source file."""
    skipped: Natural
    """Images that could not be stored; FILE.beton.skipped lists them."""
    duplicates: Natural
    """Images whose payload is also that of another image."""
    left_out: Natural
    """Source files without an image extension."""
    classes: tuple[str, ...]
    """Class names in label order."""
    class_counts: tuple[Natural, ...]
    """Images of each class."""
    size: Count
    """Bytes of the file."""
    sha256: Sha256
    """Hash of the file."""
    tables_sha256: Sha256
    """Hash of its tables: header, metadata and allocation table."""
    hashes_sha256: Sha256
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
            DataError: it is unreadable, malformed or contradicts itself.
        """
        try:
            manifest = parse_json(read_regular(path, _MANIFEST_BYTES), cls, "", DataError)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(path, "a readable file", error.strerror) from None
        except DataError as error:
            key = str(error.where).removeprefix(": ")
            expected = f"{key} of the manifest to be {error.expected}"
            raise DataError(path, expected if key else "a manifest in JSON", error.got) from None
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Raise DataError if the numbers of classes or of images do not agree."""
        names, counts = len(self.classes), len(self.class_counts)
        if not names or names != counts:
            got = f"{names} and {counts}"
            raise DataError(path, "as many classes as class_counts in the manifest", got)
        if len(set(self.classes)) < names:
            twice = next(n for i, n in enumerate(self.classes) if n in self.classes[:i])
            raise DataError(path, "every class once in the manifest", f"{twice!r} twice")
        total = sum(self.class_counts)
        if max(total, self.changed, self.duplicates) > self.num_samples or total < self.num_samples:
            numbers = ("num_samples", "changed", "duplicates")
            got = ", ".join(f"{name} {getattr(self, name)}" for name in numbers)
            expected = f"numbers of images in the manifest that go with class_counts of {total}"
            raise DataError(path, expected, got)


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
    with open_regular(path) as file, progress(show, path.stat().st_size, unit="B") as bar:
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
    path, digest = beside(beton, HASHES), hashlib.sha256()
    expected = "the file of hashes in the manifest"
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(partial(file.readline, _LINE_BYTES), b""), 1):
                if not _LINE.fullmatch(line):
                    raise DataError(path, expected, f"damage in line {number}")
                digest.update(line)
            if digest.hexdigest() != manifest.hashes_sha256:
                raise DataError(path, expected, "another one")
            file.seek(0)
            for line in file:
                text = line.lstrip(b"\\")
                name = re.sub(rb"\\(.)", lambda found: _ESCAPES[found[1]], text[66:-1])
                yield SampleHash(bytes.fromhex(text[:64].decode()), os.fsdecode(name))
    except OSError as error:
        raise DataError(path, "the file of sample hashes", error.strerror) from None
