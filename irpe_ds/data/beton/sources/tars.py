"""Tar archives, read in place, and archives of one class each."""

import os
from collections.abc import Iterator
from pathlib import Path

from irpe_ds.data.beton.sources.source import Source, SourceFile
from irpe_ds.data.beton.tar import COMPLETE, TarEntry, read_tar
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular


class Tar(Source):
    """The files in a tar, or in several that have a list of labels."""

    kind = "a tar"

    def files(self) -> Iterator[SourceFile]:
        for path in self.archives:
            stamp = path.stat().st_mtime_ns
            for entry in entries(path):
                yield in_tar(entry, path, stamp)


class TarOfTars(Source):
    """A tar with a tar for each class: ILSVRC2012_img_train.tar, ImageNet-21k's.

    Each is listed as a folder with its name.
    """

    kind = "a tar of class tars"

    def files(self) -> Iterator[SourceFile]:
        stamp = self.path.stat().st_mtime_ns
        for outer in entries(self.path):
            listed = in_tar(outer, self.path, stamp)
            if not listed.path.endswith(".tar"):
                yield listed
                continue
            folder = listed.path.removesuffix(".tar") + "/"
            yield listed._replace(path=folder)
            for entry in entries(self.path, outer):
                yield in_tar(entry, self.path, stamp, folder)


class ClassTars(Source):
    """A tar for each class, as unpacked from such an archive."""

    kind = "class tars"

    def files(self) -> Iterator[SourceFile]:
        for path in self.archives:
            stamp, folder = path.stat().st_mtime_ns, path.stem + "/"
            yield SourceFile(folder, os.fspath(path))
            for entry in entries(path):
                listed = in_tar(entry, path, stamp)
                if listed.path.rpartition("/")[0] not in ("", path.stem):
                    expected = f"images of one class in {path}, as there are several tars"
                    raise DataError("--source", expected, entry.name)
                yield listed._replace(path=folder + listed.path)


def entries(path: Path, inner: TarEntry | None = None) -> Iterator[TarEntry]:
    """The files and folders of an archive, or of an archive in it, with offsets into the outer."""
    where = path if inner is None else f"{path}: {inner.name}"
    try:
        with open_regular(path) as file:
            begin, end = 0, os.fstat(file.fileno()).st_size
            if inner is not None:
                begin, end = inner.offset, inner.offset + inner.size
            yield from read_tar(file, where, begin, end)
    except OSError as error:
        raise DataError(where, COMPLETE, error) from None


def in_tar(entry: TarEntry, path: Path, stamp: int, folder: str = "") -> SourceFile:
    """A file of an archive, below a folder."""
    name = folder + clean(entry.name)
    return SourceFile(name, os.fspath(path), entry.offset, entry.size, stamp)


def clean(path: str) -> str:
    """A path in an archive without a leading `./` or `/`; a folder's keeps its slash at the end."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "/".join(parts) + "/" * path.endswith("/")
