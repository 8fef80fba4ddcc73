"""The files in a tar archive: where their bytes are. No header is believed unchecked.

Not tarfile, which (Python 3.11) never ends on a negative size, reads headers of any length into
memory, recurses as deep as they are chained, and takes a damaged one for the end of the archive.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from irpe_ds.errors import DataError

COMPLETE = "a complete, uncompressed tar"
_BLOCK = 512  # bytes of a header; contents are padded to multiples of it
_GLOBAL, _LONG_NAME, _LONG_LINK = b"g", b"L", b"K"  # of PAX, GNU and GNU
_PAX = (b"x", b"X", _GLOBAL)
_EXTENDED_BYTES = 1 << 20  # of names, times and extended attributes
_EXTENDED_COUNT = 16  # before one file; archivers write up to 3
_TAIL_BYTES = 1 << 20  # of zeros after the last file; archivers pad to 10 KiB


class TarEntry(NamedTuple):
    """A regular file or a folder in an archive."""

    name: str
    """Its path; a folder's ends with a slash."""
    offset: int
    """Where its bytes begin in the file that was read."""
    size: int
    """Bytes."""


def read_tar(file: BinaryIO, where: object, begin: int, end: int) -> Iterator[TarEntry]:
    """The files and folders of the archive (ustar, PAX or GNU) in bytes `begin` to `end` of a file.

    Args:
        where: names the archive in errors.

    Raises:
        DataError: it is damaged, incomplete or compressed, or holds something else than regular
            files and folders, such as a link.
    """
    place, extended = begin, 0
    common: dict[bytes, bytes] = {}  # PAX's records for all files that follow
    own: dict[bytes, bytes] = {}  # for the next one
    while any(header := _read(file, place, min(_BLOCK, end - place))):
        if len(header) < _BLOCK or not _has_its_checksum(header):
            raise _damage(where, place)
        kind, records = header[156:157], {**common, **own}
        content = place + _BLOCK
        if kind in (*_PAX, _LONG_NAME, _LONG_LINK):
            size, extended = _size(header, {}, where), extended + 1
            if size > _EXTENDED_BYTES or extended > _EXTENDED_COUNT:
                expected = f"up to {_EXTENDED_COUNT} headers of {_EXTENDED_BYTES} bytes per file"
                got = f"number {extended} of {size} bytes, at byte {place}"
                raise DataError(where, expected, got)
            data = _read(file, content, min(size, end - content))
            if kind in _PAX:
                (common if kind == _GLOBAL else own).update(_pax_records(data, where, content))
            elif kind == _LONG_NAME:
                own[b"path"] = _text(data)
        elif kind == b"5" or (kind == b"\0" and _path(header, records).endswith("/")):
            yield TarEntry(_path(header, records).rstrip("/") + "/", content, 0)
            size, own, extended = 0, {}, 0  # a folder has no content, whatever its size says
        else:
            name, size = _path(header, records), _size(header, records, where)
            if kind not in (b"0", b"\0", b"7") or b"GNU.sparse" in records:
                got = f"{name}, a link, a device or a sparse file (tar -h --hard-dereference)"
                raise DataError(where, "regular files", got)
            if content + size > end:
                raise DataError(where, COMPLETE, f"one that ends within {name}, of {size} bytes")
            yield TarEntry(name, content, size)
            own, extended = {}, 0
        place = content + -(-size // _BLOCK) * _BLOCK
    tail = _read(file, place, min(_TAIL_BYTES, end - place))
    if len(tail) < _BLOCK or any(tail) or own:
        raise _damage(where, place)
    if end - place > _TAIL_BYTES:
        raise DataError(where, COMPLETE, f"{end - place} bytes after its last file")


def _damage(where: object, place: int) -> DataError:
    return DataError(where, COMPLETE, f"damage at byte {place}")


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(max(0, size))


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _path(header: bytes, records: dict[bytes, bytes]) -> str:
    """A file's path, of which ustar keeps the beginning in a field of its own."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
    own = prefix + b"/" * bool(prefix) + _text(header[:100])
    return os.fsdecode(records.get(b"path", own))


def _has_its_checksum(header: bytes) -> bool:
    """Whether its bytes add up to its checksum; some archivers add signed bytes."""
    others = header[:148] + header[156:]
    total = 8 * ord(" ") + sum(others)
    signed = total - 256 * sum(byte > 127 for byte in others)
    return _number(header[148:156]) in (str(total), str(signed))


def _size(header: bytes, records: dict[bytes, bytes], where: object) -> int:
    own = os.fsdecode(records[b"size"]) if b"size" in records else _number(header[124:136])
    if not re.fullmatch("[0-9]{1,19}", own):
        raise DataError(where, "a size in bytes", f"{own[:20]} of {_path(header, records)}")
    return int(own)


def _number(field: bytes) -> str:
    """A number of a header in decimal: it is in base 256 if the first bit is set, else in octal."""
    if field[0] in (0o200, 0o377):
        sign = (field[0] == 0o377) * 256 ** len(field[1:])
        return str(int.from_bytes(field[1:], "big") - sign)
    digits = os.fsdecode(_text(field).strip())
    return str(int(digits or "0", 8)) if re.fullmatch("[0-7]*", digits) else f"octal {digits}"


def _pax_records(data: bytes, where: object, begin: int) -> dict[bytes, bytes]:
    """Those of the records `length key=value` of an extended header that matter here."""
    found, place = {}, 0
    while place < len(data):
        match = re.compile(rb"([0-9]{1,7}) ([^=]+)=").match(data, place)
        last = place + int(match[1]) - 1 if match else 0
        if match is None or last < match.end() or data[last : last + 1] != b"\n":
            raise _damage(where, begin + place)
        key = b"GNU.sparse" if match[2].startswith(b"GNU.sparse") else match[2]
        if key in (b"path", b"size", b"GNU.sparse"):
            found[key] = data[match.end() : last]
        place = last + 1
    return found
