"""Reading the images of a source."""

import errno
from collections import OrderedDict
from threading import Lock

from irpe_ds.data.beton.sources.source import IMAGE_BYTES, Member, Reader, Source
from irpe_ds.errors import DataError
from irpe_ds.files import read_regular

_NO_FILE = (errno.EINVAL, errno.ENXIO)  # a FIFO, a device, a socket: no fault of the source
_OPEN = 64  # archives that stay open: a data set may have more than a process may open


class Files:
    """Reads members of a source, from any thread; archives stay open."""

    def __init__(self, source: Source) -> None:
        self._source, self._readers, self._lock = source, OrderedDict[str, Reader](), Lock()

    def __reduce__(self) -> tuple[type["Files"], tuple[Source]]:
        return Files, (self._source,)  # a worker process opens archives of its own

    def read(self, member: Member) -> bytes:
        """The bytes of a member.

        Raises:
            ValueError: they are none of an image: too many, or of no regular file.
            DataError: the source is not what it was when it was listed: unmounted, for example.
        """
        if member.size > IMAGE_BYTES:
            raise ValueError(f"{member.size} bytes, over {IMAGE_BYTES}")
        try:
            if member.offset:
                data = self._reader(member.file).read(member.offset, member.size)
            else:
                data = read_regular(member.file, member.size)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise ValueError(error.strerror) from None
            raise _gone(member, error.strerror) from None
        if len(data) != member.size and self._source.tells_sizes:
            raise _gone(member, f"{len(data)} bytes instead of {member.size}")
        return data

    def _reader(self, path: str) -> Reader:
        """One of the readers used last, or a new one."""
        with self._lock:
            reader = self._readers.pop(path, None) or self._source.reader(path)
            self._readers[path] = reader
            if len(self._readers) > _OPEN:
                self._readers.popitem(last=False)  # its last user closes it
            return reader

    def close(self) -> None:
        """Close the archives."""
        self._readers.clear()


def _gone(where: object, got: object) -> DataError:
    return DataError(where, "the file as it was listed (rerun when the source is back)", got)
