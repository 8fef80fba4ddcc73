"""Write FFCV's .beton format, in order and resumable.

FFCV 1.0.2's own writer hangs when one of its processes fails or a sample exceeds the page, and
orders the pages as its processes happen to finish. This one leaves reading and encoding to its
caller's threads and only places the bytes: the same input gives the same file.

Layout: header, field descriptors, one metadata entry per sample, pages, allocation table. Pages
begin at multiples of the page size, and no payload crosses from one page into the next.
"""

import os
from collections.abc import Iterable
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
)

FIRST_PAGE_BYTES = 1 << 23  # FFCV's default; doubled whenever a payload needs more


def first_payload(room: int) -> int:
    """Where the payloads begin in a file with room for this many samples."""
    return _round_up(HEAD_BYTES + room * ENTRY_TYPE.itemsize, FIRST_PAGE_BYTES)


def file_size(num_samples: int, payloads: int) -> int:
    """Bytes of a file with this many bytes of payload, without the gaps at the ends of pages."""
    end = _round_up(first_payload(num_samples) + payloads, FIRST_PAGE_BYTES)
    return end + num_samples * ALLOC_TABLE_TYPE.itemsize


class BetonWriter:
    """Places payloads in a file, then its tables.

    Args:
        path: the file; created, or continued.
        room: samples that its tables have room for.
        end: bytes of `path` to keep; 0 starts over.
        largest: bytes of the largest payload in them.
    """

    def __init__(self, path: Path, *, room: int, end: int = 0, largest: int = 0) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._page_bytes = FIRST_PAGE_BYTES
        self._grow(largest)
        self._end = end or first_payload(room)
        os.ftruncate(self._file, end)

    def append(self, payload: bytes) -> int:
        """Write the next payload; return its offset."""
        self._grow(len(payload))
        page_end = _round_up(self._end + 1, self._page_bytes)
        if self._end + len(payload) > page_end:
            self._end = page_end
        start = self._end
        self._write(payload, start)
        self._end += len(payload)
        return start

    def _write(self, data: bytes, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.pwrite(self._file, rest, offset + len(data) - len(rest)) :]

    def _grow(self, size: int) -> None:
        while size > self._page_bytes:
            # Pages only double: a payload within a small page is also within a large one.
            self._page_bytes *= 2

    def sync(self) -> None:
        """Return when everything written is on the disk; another thread may write meanwhile."""
        os.fsync(self._file)

    def finish(self, tables: Iterable[tuple[NDArray[np.void], NDArray[np.void]]]) -> None:
        """Write the tables, given in chunks of (metadata entries, allocations).

        `sync` brings them to the disk.
        """
        written = 0
        allocations = _round_up(self._end, self._page_bytes)
        os.ftruncate(self._file, self._end)  # of an earlier attempt to finish
        for entries, table in tables:
            self._write(entries.tobytes(), HEAD_BYTES + written * ENTRY_TYPE.itemsize)
            self._write(table.tobytes(), allocations + written * ALLOC_TABLE_TYPE.itemsize)
            written += len(entries)
        header = np.zeros(1, HeaderType)
        header["version"] = CURRENT_VERSION
        header["num_fields"] = len(FIELDS)
        header["page_size"] = self._page_bytes
        header["num_samples"] = written
        header["alloc_table_ptr"] = allocations
        self._write(header.tobytes() + _descriptors().tobytes(), 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _descriptors() -> np.ndarray:
    """FFCV's description of our fields."""
    type_ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    descriptors = np.zeros(len(FIELDS), FieldDescType)
    for descriptor, (name, kind) in zip(descriptors, FIELDS.items(), strict=True):
        descriptor["type_id"] = type_ids[kind]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        descriptor["arguments"][:] = kind().to_binary()[0]
    return descriptors


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
