"""Sources of images: a folder or tar archives, read in place.

Every kind of source lists the same (class, name) pairs, so the same images make the same .beton
file whatever they were packed in.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from irpe_ds.data.beton.labels import parse_label, read_classes, validation_labels
from irpe_ds.data.beton.tar import COMPLETE, TarEntry, read_tar
from irpe_ds.errors import ConfigError, DataError
from irpe_ds.files import open_regular, read_regular

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
)  # torchvision's ImageFolder

IMAGE_BYTES = 1 << 28  # of one file at most; ImageNet's largest has 15 MB
_LABEL_BYTES = 1 << 10
_NO_FILE = (errno.EINVAL, errno.ENXIO)  # a FIFO, a device, a socket: no fault of the source


class Member(NamedTuple):
    """One file of a source."""

    category: str
    """Name of its class."""
    name: str
    """Path within its class; with the class it identifies the file."""
    file: str
    """The file on disk that holds its bytes: the image file, or an archive."""
    offset: int
    """Offset of its bytes in that file; 0 if it is no archive."""
    size: int
    """Bytes."""
    stamp: int
    """Modification time of the file on disk, ns."""

    def __str__(self) -> str:
        return f"{self.file}: {self.category}/{self.name}" if self.offset else self.file


class Source(ABC):
    """Files with their classes, in a folder or in archives."""

    kind: str
    """Kind of source, in words."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.path = paths[0]

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """Every file, in any order, including files without an image extension."""

    def classes(self, found: Iterable[str]) -> tuple[str, ...]:
        """Class names in label order, given the classes that the members have."""
        return tuple(sorted(found))


def open_source(
    paths: Sequence[Path], *, labels: Path | None = None, classes: Path | None = None
) -> Source:
    """Find out the kind of a source from its contents.

    Args:
        paths: one folder with a folder per class; one .tar with a folder per class; ImageNet's
            ILSVRC2012_img_train.tar, a tar of class tars; its flat ILSVRC2012_img_val.tar, with
            `labels`; or the shards of a WebDataset.
        labels: of a flat tar: the development kit (ILSVRC2012_devkit_t12, packed or unpacked) or a
            text file with one class name per image, in the order of the images' names.
        classes: of a WebDataset: a text file with the class names, in label order.

    Raises:
        ConfigError: a path does not exist, or the arguments do not go together.
        DataError: an archive or the labels cannot be read.
    """
    expected = "a folder with one folder per class, or .tar archives"
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        got = f"{missing[0]}, which does not exist" if missing else "nothing"
        raise ConfigError("--source", expected, got)
    source: Source
    if paths[0].is_dir():
        if len(paths) > 1:
            raise ConfigError("--source", "one folder", f"{len(paths)} paths")
        source = Folder(paths[0])
    else:
        source = _archive(tuple(paths), labels, classes)
    for name, given, kind in (("--labels", labels, FlatTar), ("--classes", classes, WebDataset)):
        if given is not None and not isinstance(source, kind):
            raise ConfigError(name, f"no value, since {source.kind} has its own", given)
    return source


def _archive(paths: tuple[Path, ...], labels: Path | None, classes: Path | None) -> Source:
    """The kind of some archives, from the first files in the first one."""
    first = [entry.name for entry, _ in zip(_entries(paths[0]), range(8), strict=False)]
    suffixes = {PurePosixPath(name).suffix.lower() for name in first}
    if ".cls" in suffixes:
        return WebDataset(paths, classes)
    if len(paths) > 1:
        expected = "the shards of a WebDataset if there are several files"
        raise ConfigError("--source", expected, f"{paths[0]} without .cls files")
    if suffixes == {".tar"}:
        return ClassTars(paths[0])
    if labels is not None:
        return FlatTar(paths[0], labels)
    return Tar(paths[0])


class Folder(Source):
    """An ImageFolder: one folder per class, with images at any depth; links are followed."""

    kind = "a folder with one folder per class"

    def _folders(self) -> list[str]:
        try:
            found = [entry.name for entry in self.path.iterdir() if entry.is_dir()]
        except OSError as error:
            _unreadable(error)
        return sorted(name for name in found if name[0] != ".")

    def _loose(self) -> list[str]:
        """Names of what is in no class folder."""
        return sorted(entry.name for entry in self.path.iterdir() if not entry.is_dir())

    def members(self) -> Iterator[Member]:
        for category in self._folders():
            root, seen = self.path / category, set()
            for folder, _, names in os.walk(root, onerror=_unreadable, followlinks=True):
                there = _stat(folder)
                if (there.st_dev, there.st_ino) in seen:  # links in a circle would never end
                    raise DataError("--source", "every folder once in a class", folder)
                seen.add((there.st_dev, there.st_ino))
                for name in names:
                    file = os.path.join(folder, name)
                    found = _stat(file)
                    inner = os.path.relpath(file, root)
                    yield Member(category, inner, file, 0, found.st_size, found.st_mtime_ns)
        for name in self._loose():
            if not is_image(name):
                yield Member("", name, os.fspath(self.path / name), 0, 0, 0)

    def classes(self, found: Iterable[str]) -> tuple[str, ...]:
        classes = self._folders()
        if not classes:
            raise DataError("--source", self.kind, f"no folders in {self.path}")
        empty = sorted(set(classes) - set(found))
        if empty:
            raise DataError("--source", "images in every class folder", self.path / empty[0])
        loose = [name for name in self._loose() if is_image(name)]
        if loose:
            raise DataError("--source", "every image in a class folder", self.path / loose[0])
        return tuple(classes)


class Tar(Source):
    """An archive of an ImageFolder: the folder that holds an image is its class."""

    kind = "a tar with one folder per class"

    def members(self) -> Iterator[Member]:
        depth = None
        for entry in _entries(self.path):
            parts = PurePosixPath(entry.name).parts
            if not is_image(entry.name):
                yield _member(parts[-2] if len(parts) > 1 else "", entry, self.path)
                continue
            if depth not in (None, len(parts)):
                expected = f"{self.path} with all images at the same depth"
                raise DataError("--source", expected, entry.name)
            depth = len(parts)
            if depth < 2:
                expected = f"{self.path} with one folder per class, or --labels"
                raise DataError("--source", expected, f"{entry.name} without a folder")
            yield _member(parts[-2], entry, self.path)


class ClassTars(Source):
    """ILSVRC2012_img_train.tar: an archive with one archive per class."""

    kind = "a tar of class tars"

    def members(self) -> Iterator[Member]:
        for inner in _entries(self.path):
            name = PurePosixPath(inner.name)
            if name.suffix != ".tar":
                expected = f"only class archives (.tar) in {self.path}"
                raise DataError("--source", expected, inner.name)
            for entry in _entries(self.path, inner):
                yield _member(name.stem, entry, self.path)


class FlatTar(Source):
    """ILSVRC2012_img_val.tar: images without folders, with their classes in another file."""

    kind = "a flat tar with a list of labels"

    def __init__(self, path: Path, labels: Path) -> None:
        super().__init__(path)
        self._labels = validation_labels(labels)
        self._where = labels

    def members(self) -> Iterator[Member]:
        path, images = self.path, []
        for entry in _entries(path):
            if is_image(entry.name):
                images.append(entry)
            else:
                yield _member("", entry, path)
        images.sort(key=lambda entry: entry.name)
        if len(images) != len(self._labels):
            expected = f"{len(images)} labels, one for each image of {path}"
            raise DataError("--labels", expected, f"{len(self._labels)} in {self._where}")
        for entry, category in zip(images, self._labels, strict=True):
            yield _member(category, entry, path)

    def classes(self, found: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(self._labels)))


class WebDataset(Source):
    """Shards with key.jpg next to key.cls, which holds the number of a class or its name."""

    kind = "WebDataset shards"

    def __init__(self, paths: tuple[Path, ...], classes: Path | None) -> None:
        super().__init__(*paths)
        self._names = None if classes is None else read_classes(classes)
        self._numbers = {name: number for number, name in enumerate(self._names or ())}

    def members(self) -> Iterator[Member]:
        numbered = None
        for path in self.paths:
            for key, group in groupby(_entries(path), key=lambda entry: _key(entry.name)):
                entries = list(group)
                images = [entry for entry in entries if is_image(entry.name)]
                labels = [entry for entry in entries if entry.name == f"{key}.cls"]
                if len(images) != 1 or len(labels) != 1:
                    got = ", ".join(entry.name for entry in entries)
                    raise DataError("--source", f"one image and one .cls per key in {path}", got)
                where, text = f"{path}: {labels[0].name}", _text(path, labels[0])
                label = parse_label(text, where)
                if self._names is not None:
                    category = self._class(text, label, where)
                else:
                    category = str(label)
                    if numbered not in (None, isinstance(label, int)):
                        expected = "labels that are all numbers or all names, without --classes"
                        raise DataError(where, expected, text)
                    numbered = isinstance(label, int)
                yield _member(category, images[0], path)._replace(name=images[0].name)

    def _class(self, text: str, label: int | str, where: str) -> str:
        """The name in --classes that a label is, or is the number of."""
        names, number = self._names or (), self._numbers.get(text)
        if isinstance(label, str):
            if number is None:
                raise DataError(where, "a label that --classes has", text)
            return label
        if number not in (None, label):
            expected = "a label that is not both a name in --classes and another's number"
            raise DataError(where, expected, text)
        if label >= len(names):
            raise DataError(where, f"labels below {len(names)}, the number of --classes", text)
        return names[label]

    def classes(self, found: Iterable[str]) -> tuple[str, ...]:
        if self._names is not None:
            return self._names
        names = sorted(found)
        if not all(name.isascii() and name.isdigit() for name in names):
            return tuple(names)
        numbers = sorted(map(int, names))
        if numbers != list(range(len(numbers))):
            seen = f"labels reach {numbers[-1]} (different ones seen: {len(numbers)})"
            raise DataError("--classes", f"the names of all classes, since {seen}", "nothing")
        return tuple(map(str, numbers))


class Files:
    """Reads members of a source, from any thread; archives stay open."""

    def __init__(self, source: Source) -> None:
        self._open = dict[str, int]()
        for path in source.paths:
            try:
                if path.is_file():
                    self._open[os.fspath(path)] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _gone(path, error.strerror) from None

    def read(self, member: Member) -> bytes:
        """The bytes of a member.

        Raises:
            ValueError: they are none of an image: too many, or of no regular file.
            DataError: the source is not what it was when it was listed: unmounted, for example.
        """
        if member.size > IMAGE_BYTES:
            raise ValueError(f"{member.size} bytes, over {IMAGE_BYTES}")
        try:
            if member.file in self._open:
                data = os.pread(self._open[member.file], member.size, member.offset)
            else:
                data = read_regular(member.file, member.size)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise ValueError(error.strerror) from None
            raise _gone(member, error.strerror) from None
        if len(data) != member.size:
            raise _gone(member, f"{len(data)} bytes instead of {member.size}")
        return data

    def close(self) -> None:
        """Close the archives."""
        for descriptor in self._open.values():
            os.close(descriptor)


def is_image(name: str) -> bool:
    """Whether a name has an image extension; hidden files (macOS: ._x.JPEG) do not count."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in EXTENSIONS and base[0] != "."


def _entries(path: Path, inner: TarEntry | None = None) -> Iterator[TarEntry]:
    """The files of an archive, or of an archive inside it, with offsets into the outer one."""
    where = path if inner is None else f"{path}: {inner.name}"
    try:
        with open_regular(path) as file:
            begin, end = 0, os.fstat(file.fileno()).st_size
            if inner is not None:
                begin, end = inner.offset, inner.offset + inner.size
            yield from read_tar(file, where, begin, end)
    except OSError as error:
        raise DataError(where, COMPLETE, error) from None


def _member(category: str, entry: TarEntry, path: Path) -> Member:
    name = PurePosixPath(entry.name).name
    stamp = path.stat().st_mtime_ns
    return Member(category, name, os.fspath(path), entry.offset, entry.size, stamp)


def _key(name: str) -> str:
    """The key of a WebDataset sample: the path up to the first dot of the file name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _text(path: Path, entry: TarEntry) -> str:
    """A label as it is written, without the spaces around it."""
    where = f"{path}: {entry.name}"
    if entry.size > _LABEL_BYTES:
        raise DataError(where, f"a label of up to {_LABEL_BYTES} bytes", entry.size)
    with path.open("rb") as file:
        file.seek(entry.offset)
        data = file.read(entry.size)
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(where, "a label in UTF-8", data[:20]) from None


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:  # such as a dangling link
        _unreadable(error)


def _gone(where: object, got: object) -> DataError:
    return DataError(where, "the file as it was listed (rerun when the source is back)", got)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError("--source", "readable folders", error)
