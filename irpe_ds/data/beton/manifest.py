"""The contents and origin of a .beton file, in files beside it.

FILE.beton.json is the manifest. FILE.beton.sha256 has a line per sample, `hash  class/name`, in
sha256sum's format: in the source folder, `sha256sum -c` compares it with images stored as they
are. FILE.beton.skipped lists the images that could not be stored, FILE.beton.left_out the files
that are no images, both with reasons (irpe_ds/data/beton/left_out.py).

A sharded data set has no FILE.beton, but shards FILE-00000-of-00064.beton, each with such files of
its own. FILE.beton.json is then the index: the manifest of all of them, with a record of each.
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

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from irpe_ds.config_types import Count, Natural
from irpe_ds.data.beton.places import target
from irpe_ds.data.parallel import progress
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular, read_regular, replace_file
from irpe_ds.schema import parse_json

FORMAT: Final = 3
MANIFEST = ".json"
HASHES = ".sha256"
SKIPPED = ".skipped"
SHARDING = ".sharding"
"""Of the folder of an unfinished sharded conversion."""
LEFT_OUT = ".left_out"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""64 hexadecimal digits"""

_CHUNK_BYTES = 1 << 22
_MANIFEST_BYTES = 1 << 24  # 100,000 classes need 3 MB
_LINE = re.compile(rb"\\[0-9a-f]{64}  (?:[^\\\n]|\\[\\nr])+\n|[0-9a-f]{64}  [^\\\n]+\n")
_NAME_AT = 66  # of 64 digits and two spaces
_DIGITS = np.full(256, 255, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_OF_MANIFEST = "the file of hashes in the manifest"
_LINE_BYTES = 1 << 14  # a path has up to 4,096, and each may be escaped
_ESCAPES = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What identifies one .beton file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_samples: Count
    """Images in the file."""
    size: Count
    """Bytes of the file."""
    sha256: Sha256
    """Hash of the file."""
    tables_sha256: Sha256
    """Hash of its tables: header, metadata and allocation table."""
    hashes_sha256: Sha256
    """Hash of FILE.beton.sha256."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetManifest(FileRecord):
    """Contents and origin of one .beton file, or of a sharded data set.

    Of a set, `size` counts the bytes of all shards, and each hash is that of its shards' hashes, in
    order, a line each.
    """

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
    changed: Natural
    """Images not stored as the bytes of their source file."""
    skipped: Natural
    """Images that could not be stored; FILE.beton.skipped lists them."""
    duplicates: Natural
    """Images whose payload is also that of another image."""
    left_out: Natural
    """Source files without an image extension; FILE.beton.left_out lists them."""
    classes: tuple[str, ...]
    """Class names in label order."""
    class_counts: tuple[Natural, ...]
    """Images of each class."""
    ffcv: str
    """Version of FFCV that converted."""
    command: str
    """Command that converted."""
    shards: tuple[FileRecord, ...] = ()
    """The files of a sharded data set, in order; none: it is one file."""

    def files(self, path: Path) -> list[tuple[Path, FileRecord]]:
        """The .beton files of the data set at `path`, in order, with their records."""
        if not self.shards:
            return [(path, self)]
        count = len(self.shards)
        return [(shard_path(path, n, count), record) for n, record in enumerate(self.shards)]

    def write(self, path: Path) -> None:
        """Write to `path`, atomically."""
        values = {"format": self.format} | dataclasses.asdict(self)
        replace_file(path, json.dumps(values, indent=1) + "\n")

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
        sums = {
            name: sum(getattr(s, name) for s in self.shards) for name in ("num_samples", "size")
        }
        if self.shards and any(getattr(self, name) != found for name, found in sums.items()):
            got = ", ".join(f"{name} {getattr(self, name)}" for name in sums)
            expected = ", ".join(f"{name} {found}" for name, found in sums.items())
            raise DataError(path, f"the sums of the manifest's shards, {expected}", got)


def shard_path(path: Path, number: int, count: int) -> Path:
    """A file of the data set at `path`: train-00000-of-00064.beton of train.beton."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def is_there(path: Path) -> bool:
    """Whether there is a .beton file, or the index of a sharded data set, of this name."""
    if path.exists():
        return True
    try:
        manifest = read_manifest(path)
    except DataError:
        return False
    return manifest is not None and bool(manifest.shards)


def read_manifest(beton: Path) -> DatasetManifest | None:
    """The manifest of a .beton file, or None if it has none.

    Raises:
        DataError: it is unreadable or malformed.
    """
    try:
        return DatasetManifest.read(find_beside(beton, MANIFEST))
    except FileNotFoundError:
        return None


def find_beside(beton: Path, suffix: str) -> Path:
    """The file beside a .beton; of a symbolic link that has none, beside what it leads to."""
    own = beside(beton, suffix)
    return own if own.exists() or not beton.is_symlink() else beside(target(beton), suffix)


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
        DataError: a file of hashes is not the one of the manifest.
    """
    for path, record in manifest.files(beton):
        yield from file_hashes(path, record.hashes_sha256)


def file_hashes(beton: Path, sha256: str) -> Iterator[SampleHash]:
    """The lines of one file of hashes, which has this hash; errors as of `read_hashes`."""
    path, digest = find_beside(beton, HASHES), hashlib.sha256()
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(partial(file.readline, _LINE_BYTES), b""), 1):
                if not _LINE.fullmatch(line):
                    raise DataError(path, _OF_MANIFEST, f"damage in line {number}")
                digest.update(line)
            if digest.hexdigest() != sha256:
                raise DataError(path, _OF_MANIFEST, "another one")
            file.seek(0)
            for line in file:
                text = line.lstrip(b"\\")
                name = re.sub(rb"\\(.)", lambda found: _ESCAPES[found[1]], text[_NAME_AT:-1])
                yield SampleHash(bytes.fromhex(text[:64].decode()), os.fsdecode(name))
    except OSError as error:
        raise DataError(path, "the file of sample hashes", error.strerror) from None


def hash_prefixes(beton: Path, sha256: str) -> NDArray[np.uint64]:
    """The first 64 bits of each hash in one file of hashes, (lines,); errors as of `read_hashes`.

    Without a step per line, as a million of them would take seconds.
    """
    path, digest = find_beside(beton, HASHES), hashlib.sha256()
    found, rest = list[NDArray[np.uint64]](), b""
    try:
        with open_regular(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                prefixes = _prefixes(whole + newline)
                if prefixes is None:
                    break
                found.append(prefixes)
            else:
                if not rest and digest.hexdigest() == sha256:
                    return np.concatenate([np.empty(0, np.uint64), *found])
    except OSError as error:
        raise DataError(path, "the file of sample hashes", error.strerror) from None
    # Damaged, or with escapes in a name.
    exact = (int.from_bytes(line.sha256[:8], "big") for line in file_hashes(beton, sha256))
    return np.fromiter(exact, np.uint64)


def _prefixes(lines: bytes) -> NDArray[np.uint64] | None:
    """Those of some lines; None if one is not of digits, two spaces and a name without escapes."""
    text = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    if not len(ends) or (ends - starts).min() <= _NAME_AT or b"\\" in lines:
        return None
    heads = sliding_window_view(text, _NAME_AT)[starts]
    digits = _DIGITS[heads[:, :16]]
    if digits.max() > 15 or (heads[:, _NAME_AT - 2 :] != ord(" ")).any():
        return None
    return (digits[:, ::2] << 4 | digits[:, 1::2]).view(">u8")[:, 0].astype(np.uint64)
