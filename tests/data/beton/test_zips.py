"""Zip archives are listed and read as zipfile does; what is damaged or hostile is refused."""

import struct
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from irpe_ds.data.beton.options import SourceOptions
from irpe_ds.data.beton.sources.files import Files
from irpe_ds.data.beton.sources.source import Member
from irpe_ds.data.beton.sources.zips import Zip
from irpe_ds.errors import DataError

CONTENTS = {"a/1.jpg": b"1" * 999, "a/": b"", "ü/é.jpg": b"", "b.jpg": bytes(range(256))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, (name, data) in enumerate(CONTENTS.items()):
            archive.writestr(name, data, (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)[number % 2])
        archive.comment = b"comment"
    return tmp_path / "a.zip"


def read(path: Path) -> dict[str, bytes]:
    source = Zip([path], SourceOptions())
    with closing(Files(source)) as files:
        return {file.path: files.read(Member("", file.path, *file[1:5])) for file in source.files()}


def test_same_as_zipfile(path: Path) -> None:
    assert read(path) == CONTENTS


@pytest.mark.thorough
def test_sizes_of_64_bits(tmp_path: Path) -> None:
    """What zipfile writes where it does not know the size before, and a long list of files."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        with archive.open("a.jpg", "w", force_zip64=True) as file:
            file.write(b"abc")
        for number in range(70_000):
            archive.writestr(str(number), b"")
    found = list(Zip([tmp_path / "a.zip"], SourceOptions()).files())
    assert (len(found), found[0].size, found[-1].path) == (70_001, 3, "69999")


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


DIRECTORY = b"PK\1\2" + struct.pack("<4H", 0x0314, 20, 0, 8)  # of the deflated a/1.jpg
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (lambda data: data[:-20], "no directory at its end"),
    "cut at the front": (lambda data: data[9:], "damage in its directory, or bytes before"),
    "bytes before": (lambda data: b"x" * 9 + data, "damage in its directory, or bytes before"),
    "empty": (lambda data: b"PK", "no directory at its end"),
    "encrypted": (
        replaced(DIRECTORY, DIRECTORY[:8] + b"\1\0\x08\0"),
        "a/1.jpg, which is encrypted",
    ),
    "method": (replaced(DIRECTORY, DIRECTORY[:10] + b"\x0c\0"), "a/1.jpg, compressed by method 12"),
    "no record": (replaced(b"PK\1\2", b"PK\1\3"), "damage in its directory"),
    "size": (replaced(struct.pack("<I", 256), b"\0\0\0\x7f"), "damage|ends after|of two sizes"),
    "end": (replaced(b"PK\5\6", b"PK\5\6\1\0"), "damage|no directory|one part of several"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive(kind: str, path: Path) -> None:
    change, message = HOSTILE[kind]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=rf"a\.zip: expected a complete zip .*({message})"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(bytes(range(256)), bytes(256)), "do not fit their checksum"),
        (replaced(b"PK\3\4", b"PK\3\5"), "no header where its directory says"),
    ],
)
def test_damaged_file(change: Callable[[bytes], bytes], message: str, path: Path) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read(path)


def test_file_larger_than_it_says(path: Path) -> None:
    path.write_bytes(replaced(struct.pack("<I", 999), struct.pack("<I", 99))(path.read_bytes()))
    with pytest.raises(ValueError, match="100 bytes instead of 99"):
        read(path)
