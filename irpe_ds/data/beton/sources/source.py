"""What a source is: files with paths, which `irpe_ds/data/beton/listing.py` gives their classes."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from irpe_ds.data.beton.options import SourceOptions

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
)  # torchvision's ImageFolder

IMAGE_BYTES = 1 << 28  # of one file at most; ImageNet's largest has 15 MB
LABEL_BYTES = 1 << 10  # of a label, written beside its image


class SourceFile(NamedTuple):
    """One file of a source, as it was found."""

    path: str
    """Its path in the source, with slashes; that of a folder ends with one."""
    file: str
    """The file on disk that holds its bytes: the image file, or an archive."""
    offset: int = 0
    """Where in that file: the first byte, of a zip the record, of Parquet the row from 1. 0: the
    file itself."""
    size: int = 0
    """Bytes; of a row of Parquet, the mean of its row group."""
    stamp: int = 0
    """Modification time of the file on disk, ns."""
    label: str | None = None
    """Its label, where the source has labels."""

    @property
    def where(self) -> str:
        """Its name in messages."""
        return f"{self.file}: {self.path}" if self.offset else self.file


class Member(NamedTuple):
    """An image of a source, with its class."""

    category: str
    """Name of its class."""
    name: str
    """Path below its class; with the class it identifies the image."""
    file: str
    """This and the following as of SourceFile."""
    offset: int
    size: int
    stamp: int

    def __str__(self) -> str:
        return f"{self.file}: {self.category}/{self.name}" if self.offset else self.file


class Reader(Protocol):
    """An open file on disk that holds several files of a source; used from any thread."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of the file at an offset, as in SourceFile.

        Raises:
            OSError: they cannot be read.
            ValueError: they are damaged.
        """


class Source(ABC):
    """Files in a folder, in archives or in tables."""

    kind: str
    """Kind of source, in words."""
    has_labels = False
    """Whether its files come with labels; if not, their paths or a list have them."""
    tells_sizes = True
    """Whether the listed size of a file is its own, and not an estimate."""
    names: tuple[str, ...] | None = None
    """The class names in label order, where the source has them."""

    within = ""
    """The folder in an archive that was named, with a slash at its end; what is beside it is not of
    the source."""

    def __init__(self, paths: Sequence[Path], options: SourceOptions) -> None:
        self.paths = self.archives = tuple(paths)
        """As they were given, and as they are read: all archives of a folder, for example."""
        self.path, self.options = paths[0], options

    @abstractmethod
    def files(self) -> Iterator[SourceFile]:
        """Every file, in any order, whatever it holds, and every folder."""

    def reader(self, path: str) -> Reader:
        """Open one of the files on disk that hold several."""
        return Slices(path)


class Slices:
    """Parts of a file, such as the files in a tar."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at an offset; fewer at the end of the file."""
        return os.pread(self._file, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def is_image(path: str) -> bool:
    """Whether a path has an image extension and nothing hidden in it."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a path leads through hidden files or folders, or macOS' copies of attributes."""
    return path.startswith((".", "__MACOSX/")) or "/." in path or "/__MACOSX/" in path
