"""A folder of images; links are followed."""

import os
from collections.abc import Iterator
from typing import NoReturn

from irpe_ds.data.beton.sources.source import Source, SourceFile
from irpe_ds.errors import DataError


class Folder(Source):
    """The files in a folder and below it."""

    kind = "a folder"

    def files(self) -> Iterator[SourceFile]:
        root = os.fspath(self.path)
        for entry in _scan(root):
            if entry.is_dir():
                yield from _walk(root, entry.path)
            else:
                yield _found(root, entry.path)


def _walk(root: str, top: str) -> Iterator[SourceFile]:
    """A folder in the root, and all that is below it."""
    seen = set()
    for folder, _, names in os.walk(top, onerror=_unreadable, followlinks=True):
        there = _stat(folder)
        if (there.st_dev, there.st_ino) in seen:  # links in a circle would never end
            raise DataError("--source", "every folder once in a class", folder)
        seen.add((there.st_dev, there.st_ino))
        yield SourceFile(os.path.relpath(folder, root) + "/", folder)
        for name in names:
            yield _found(root, os.path.join(folder, name))


def _found(root: str, file: str) -> SourceFile:
    there = _stat(file)
    return SourceFile(os.path.relpath(file, root), file, 0, there.st_size, there.st_mtime_ns)


def _scan(root: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(root))
    except OSError as error:
        _unreadable(error)


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:  # such as a dangling link
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError("--source", "readable folders", error)
