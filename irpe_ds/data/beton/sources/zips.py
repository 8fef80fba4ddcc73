"""The files in a zip archive: where their records are. No record is believed unchecked.

Not zipfile, which (Python 3.11) keeps half a kilobyte of every file in memory.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from irpe_ds.data.beton.sources.source import IMAGE_BYTES, Source, SourceFile
from irpe_ds.data.beton.sources.tars import clean
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular

_COMPLETE = "a complete zip of stored or deflated files"
_RECORD = struct.Struct("<4s6H3I5H2I")  # of a file in the directory; its name and extras follow
_LOCAL = struct.Struct("<4s5H3I2H")  # the same before its bytes
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")  # zip64's: where its end record is
_END64 = struct.Struct("<4sQ2H2I4Q")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1  # a bit of the flags
_FULL = 0xFFFFFFFF  # a number that the zip64 extra has
_COMMENT_BYTES = 0xFFFF


class Zip(Source):
    """The files in a zip."""

    kind = "a zip"

    def files(self) -> Iterator[SourceFile]:
        file, stamp = os.fspath(self.path), self.path.stat().st_mtime_ns
        for place, record in _directory(self.path):
            yield SourceFile(clean(record.name), file, place, record.size, stamp)

    def reader(self, path: str) -> "ZipReader":
        return ZipReader(path)


class _Record(NamedTuple):
    """A file's record in the directory."""

    name: str
    method: int
    crc: int
    packed: int
    """Bytes in the archive."""
    size: int
    """Bytes."""
    header: int
    """Where the local header is."""
    length: int
    """Bytes of the record."""


class ZipReader:
    """Files of a zip by the places of their records."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of the file with the record at an offset, if they fit its checksum."""
        head = os.pread(self._file, _RECORD.size, offset)
        record = _record(head, lambda rest: os.pread(self._file, rest, offset + _RECORD.size))
        local = os.pread(self._file, _LOCAL.size, record.header)
        if len(local) < _LOCAL.size or local[:4] != b"PK\3\4":
            raise ValueError("a damaged zip: no header where its directory says")
        begin = record.header + _LOCAL.size + sum(_LOCAL.unpack(local)[-2:])
        if record.packed > IMAGE_BYTES:
            raise ValueError(f"{record.packed} bytes in the zip, over {IMAGE_BYTES}")
        data = os.pread(self._file, record.packed, begin)
        if record.method == _DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise ValueError(f"a damaged zip: {error}") from None
        if len(data) == size and zlib.crc32(data) != record.crc:
            raise ValueError("a damaged zip: its bytes do not fit their checksum")
        return data


def _directory(path: Path) -> Iterator[tuple[int, _Record]]:
    """Place and record of every file and folder."""
    try:
        with open_regular(path) as file:
            place, end, count = _extent(file)
            file.seek(place)
            for _ in range(count):
                record = _record(file.read(_RECORD.size), file.read)
                if record.header + _LOCAL.size + record.packed > end:
                    raise ValueError(f"{record.name}, which ends after the archive")
                yield place, record
                place += record.length
            if place != end:
                raise ValueError(f"{end - place} bytes after its {count} records")
    except (OSError, ValueError) as error:
        raise DataError(path, _COMPLETE, error) from None


def _extent(file: BinaryIO) -> tuple[int, int, int]:
    """Where the directory begins and ends, and how many records it has."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _END.size - _COMMENT_BYTES))
    tail = file.read()
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        raise ValueError("no directory at its end: cut short, or no zip")
    _, disk, first_disk, _, count, length, begin, _ = _END.unpack_from(tail, found)
    end = size - len(tail) + found
    if max(count, disk) == 0xFFFF or _FULL in (length, begin):
        file.seek(max(0, end - _LOCATOR.size))
        magic, _, where, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
        file.seek(where if where < size else 0)
        data = file.read(_END64.size)
        if magic != b"PK\6\7" or data[:4] != b"PK\6\6" or len(data) < _END64.size:
            raise ValueError("a damaged end")
        *_, disk, first_disk, _, count, length, begin = _END64.unpack(data)
        end = where
    if disk or first_disk:
        raise ValueError("one part of several")
    if begin + length != end or count * _RECORD.size > length:
        raise ValueError("damage in its directory, or bytes before the archive")
    return begin, end, count


def _record(head: bytes, read: Callable[[int], bytes]) -> _Record:
    """A record with this head; `read` gives the bytes that follow."""
    if len(head) < _RECORD.size or head[:4] != b"PK\1\2":
        raise ValueError("damage in its directory")
    _, _, _, flags, method, _, _, *numbers = _RECORD.unpack(head)
    crc, packed, size, name_length, extra, comment, _, _, _, header = numbers
    tail = read(name_length + extra + comment)
    if len(tail) < name_length + extra + comment:
        raise ValueError("damage in its directory")
    name = os.fsdecode(tail[:name_length])
    if flags & _ENCRYPTED:
        raise ValueError(f"{name}, which is encrypted")
    if method not in (_STORED, _DEFLATED):
        raise ValueError(f"{name}, compressed by method {method}")
    extras = tail[name_length : name_length + extra]
    size, packed, header = _wide(extras, size, packed, header)
    if method == _STORED and packed != size:
        raise ValueError(f"{name} of two sizes")
    return _Record(name, method, crc, packed, size, header, len(head) + len(tail))


def _wide(extras: bytes, *numbers: int) -> list[int]:
    """Numbers with those of zip64's extra in place of the full ones."""
    place, wide = 0, b""
    while place + 4 <= len(extras):
        kind, length = struct.unpack_from("<2H", extras, place)
        if kind == 1:
            wide = extras[place + 4 : place + 4 + length]
        place += 4 + length
    found = []
    for number in numbers:
        if number == _FULL and len(wide) >= 8:
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(number)
    return found
