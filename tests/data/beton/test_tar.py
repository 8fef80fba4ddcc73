"""Archives of any kind are read as tarfile reads them; what is damaged or hostile is refused."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.tar import read_tar
from irpe_ds.errors import DataError

SHORT = ["a.jpg", "/".join(["folder" * 8] * 4) + ".jpg", "ü/é.jpg", "\udcff.jpg"]
LONG = [*SHORT, "x" * 120 + ".jpg"]


def entries(data: bytes) -> list[tuple[str, int, int]]:
    return [tuple(entry) for entry in read_tar(io.BytesIO(data), "a.tar", 0, len(data))]


@pytest.mark.parametrize(
    ("kind", "names"),
    [(tarfile.USTAR_FORMAT, SHORT), (tarfile.GNU_FORMAT, LONG), (tarfile.PAX_FORMAT, LONG)],
)
def test_same_as_tarfile(kind: int, names: list[str]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for number, name in enumerate(names):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            entry = tarfile.TarInfo(name)
            entry.size = 400 * number
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as archive:
        expected = [(e.name, e.offset_data, e.size) for e in archive if e.isreg()]
    found = entries(file.getvalue())
    assert [entry for entry in found if not entry[0].endswith("/")] == expected
    assert [name for name, _, _ in expected] == names
    assert [entry[0] for entry in found[::2]] == [f"folder{n}/" for n in range(len(names))]


def header(name: str, size: int | bytes, kind: bytes = b"0") -> bytes:
    """One header, with the right checksum."""
    if isinstance(size, int):
        size = b"%011o\0" % size
    block = name.encode().ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + size
    block += b"00000000000\0" + b" " * 8 + kind
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def base256(size: int) -> bytes:
    """A size in a header that octal digits do not hold."""
    return (size % (1 << 96) if size < 0 else size | 1 << 95).to_bytes(12, "big")


def pax(**records: str) -> bytes:
    """An extended header and its records, of up to 91 bytes each."""
    lines = [f" {key}={value}\n" for key, value in records.items()]
    data = "".join(f"{len(line) + 2}{line}" for line in lines).encode()
    return header("pax", len(data), b"x") + data.ljust(512, b"\0")


FILE = header("a.jpg", 3) + b"abc".ljust(512, b"\0")
END = bytes(1024)

HOSTILE = {
    "negative size": (header("b.jpg", base256(-512)), "a size in bytes, got -512 of b.jpg"),
    "negative PAX size": (pax(size="-1536") + FILE, "a size in bytes, got -1536 of a.jpg"),
    "no PAX size": (pax(size="abc") + FILE, "a size in bytes, got abc of a.jpg"),
    "large PAX size": (pax(size=str(10**18)) + FILE, "ends within a.jpg, of 1000000000000000000"),
    "no octal size": (header("b.jpg", b"9".ljust(12, b"\0")), "got octal 9 of b.jpg"),
    "larger than the archive": (header("b.jpg", base256(1 << 40)), "ends within b.jpg, of 10995"),
    "name of negative size": (header("b", base256(-512), b"L"), "a size in bytes, got -512 of b"),
    "name of any size": (header("b", base256(1 << 40), b"L"), "headers of 1048576 bytes per file"),
    "chained PAX headers": (pax(path="b.jpg") * 20_000 + FILE, "got number 17 of"),
    "chained names": ((header("b", 4, b"L") + b"b".ljust(512, b"\0")) * 20_000, "got number 17 of"),
    "damaged records": (header("p", 9, b"x") + b"99 size=1".ljust(512, b"\0") + FILE, "damage at"),
    "sparse": (pax(**{"GNU.sparse.major": "1"}) + FILE, "a.jpg, a link, a device or a sparse"),
    "old sparse": (header("b.jpg", 0, b"S"), "b.jpg, a link, a device or a sparse"),
    "device": (header("b.jpg", 0, b"4"), "b.jpg, a link, a device or a sparse"),
    "another archive after it": (END + FILE, "damage at byte"),
    "a long tail": (bytes(2 << 20), "bytes after its last file"),
    "a name without a file": (pax(path="b.jpg"), "damage at byte"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive(kind: str) -> None:
    data, message = HOSTILE[kind]
    with pytest.raises(DataError, match=r"^a\.tar: expected") as error:
        entries(FILE + data + END)
    assert message in str(error.value)
    assert entries(FILE + END) == [("a.jpg", 512, 3)]


def test_records_of_pax_hold_for_the_next_file_alone() -> None:
    data = pax(path="b.jpg") + FILE + FILE + END
    assert entries(data) == [("b.jpg", 1536, 3), ("a.jpg", 2560, 3)]
    common = header("pax", 16, b"g") + b"16 path=all.jpg\n".ljust(512, b"\0")
    assert [name for name, _, _ in entries(common + FILE + pax(path="b.jpg") + FILE + END)] == [
        "all.jpg",
        "b.jpg",
    ]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: expected a complete.* not a regular file"):
        open_source([tmp_path / "a.tar"])
