"""Writing FFCV's .beton format from one process, in order.

FFCV's own writer waits for ever when one of its processes fails or a sample exceeds the page,
and lays the pages out as its processes happen to finish. This one leaves reading and encoding to
its caller's threads and only places the bytes: the same input gives the same file.

Layout: header, field descriptors, one metadata entry per sample, pages, allocation table. Pages
begin at multiples of the page size, and no payload crosses from one page into the next.
"""

from pathlib import Path
from types import TracebackType

import numpy as np

from irpe_ds.data.ffcv_api import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FIELDS,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)
from irpe_ds.data.images import StoredImage

FIRST_PAGE_BYTES = 1 << 23  # FFCV's default; doubled whenever a payload needs more


class BetonWriter:
    """Writes `num_samples` images with labels to a file; complete once left without exception."""

    def __init__(self, path: Path, num_samples: int) -> None:
        self._file = path.open("wb")
        self._fields = _descriptors()
        fields = [field() for field in FIELDS.values()]
        self._entries = np.zeros(num_samples, get_metadata_type(fields))
        self._table = np.zeros(num_samples, ALLOC_TABLE_TYPE)
        self._page_bytes = FIRST_PAGE_BYTES
        start = HeaderType.itemsize + self._fields.nbytes + self._entries.nbytes
        self._position = _round_up(start, self._page_bytes)
        self._written = 0

    def __enter__(self) -> "BetonWriter":
        return self

    def append(self, image: StoredImage, label: int) -> None:
        """Add the next sample."""
        size = image.payload.nbytes
        while size > self._page_bytes:
            # Pages only ever double, so what lies within a small page lies within a large one.
            self._page_bytes *= 2
        page_end = _round_up(self._position + 1, self._page_bytes)
        if self._position + size > page_end:
            self._position = page_end
        self._file.seek(self._position)
        self._file.write(image.payload.data)
        entry = self._entries[self._written]
        entry["f0"] = image.entry[0]
        entry["f0"]["data_ptr"] = self._position
        entry["f1"] = label
        self._table[self._written] = (self._written, self._position, size)
        self._position += size
        self._written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._finish()

    def _finish(self) -> None:
        assert self._written == len(self._entries)
        header = np.zeros(1, HeaderType)
        header["version"] = CURRENT_VERSION
        header["num_fields"] = len(self._fields)
        header["page_size"] = self._page_bytes
        header["num_samples"] = self._written
        header["alloc_table_ptr"] = _round_up(self._position, self._page_bytes)
        self._file.seek(header["alloc_table_ptr"][0])
        self._file.write(self._table.tobytes())
        self._file.seek(0)
        for part in (header, self._fields, self._entries):
            self._file.write(part.tobytes())


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
