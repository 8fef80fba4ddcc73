"""What a .beton file holds and how it came about, in files beside it.

FILE.beton.json is the manifest. FILE.beton.sha256 has a line per sample, `hash  class/name`, as
sha256sum writes them: where images are stored as they are, `sha256sum -c` compares it with the
folder that they came from. FILE.beton.skipped lists what a conversion left out, and why.
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
class Manifest:
    """Contents and origin of one .beton file."""

    format: int = FORMAT
    """Version of this record."""
    source: list[str]
    """Folder or archives that the images came from, as they were given."""
    kind: str
    """What the source was, in words."""
    options: dict[str, Any]
    """The options of the conversion."""
    num_samples: int
    """Images in the file."""
    changed: int
    """Images that are not the bytes of their source."""
    skipped: int
    """Images that could not be stored; FILE.beton.skipped lists them."""
    duplicates: int
    """Images whose stored bytes are those of another one too."""
    left_out: int
    """Files of the source that are no images by their name."""
    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    class_counts: tuple[int, ...]
    """Images of each class."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Hash of the file."""
    tables_sha256: str
    """Hash of its tables: all that is no payload."""
    hashes_sha256: str
    """Hash of FILE.beton.sha256."""
    ffcv: str
    """Version of FFCV that converted."""
    command: str
    """Command that converted."""

    def write(self, path: Path) -> None:
        """Write the record to `path`, all of it or nothing."""
        replace_file(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a record.

        Raises:
            FileNotFoundError: there is none.
            DataError: there is one, but it cannot be read.
        """
        expected = "the manifest that data_prep/convert.py wrote"
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
            raise DataError(path, expected, "something else") from None


def read_manifest(beton: Path) -> Manifest | None:
    """The manifest of this .beton file, or None where it has none.

    Raises:
        DataError: there is one, but it cannot be read.
    """
    try:
        return Manifest.read(beside(beton, MANIFEST))
    except FileNotFoundError:
        return None


def beside(path: Path, suffix: str) -> Path:
    """The file beside this one whose name is longer by the suffix."""
    return path.with_name(path.name + suffix)


def file_sha256(path: Path, show: str | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `show` names the progress bar, if there is to be one."""
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
    """A line as sha256sum writes it: a backslash before it tells of escapes in the name."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    return f"{mark}{sha256.hex()}  ".encode() + os.fsencode(escaped) + b"\n"


def read_hashes(beton: Path, manifest: Manifest) -> Iterator[SampleHash]:
    """The line of every sample, in order.

    Raises:
        DataError: the file of hashes is not the one that the manifest describes.
    """
    path = beside(beton, HASHES)
    try:
        if file_sha256(path) != manifest.hashes_sha256:
            raise DataError(path, "the hashes that the manifest describes", "others")
        with path.open("rb") as file:
            for line in file:
                text = line.lstrip(b"\\")
                name = text[66:-1]
                if text != line:
                    name = re.sub(rb"\\(.)", lambda found: _ESCAPES[found[1]], name)
                yield SampleHash(bytes.fromhex(text[:64].decode()), os.fsdecode(name))
    except OSError as error:
        raise DataError(path, "the hashes of the samples", error.strerror) from None
