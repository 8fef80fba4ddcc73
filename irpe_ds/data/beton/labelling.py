"""What tells the class of an image, the same for every kind of source.

It is what a list (--labels) says of it, or the label that the source has beside it, or its folder.
"""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import NamedTuple

from irpe_ds.data.beton.devkit import is_devkit, validation_labels
from irpe_ds.data.beton.labels import (
    ClassList,
    in_label_order,
    is_number,
    parse_label,
    read_classes,
)
from irpe_ds.data.beton.lists import ImageList, Line, read_list
from irpe_ds.data.beton.sources import Source
from irpe_ds.data.beton.sources.source import SourceFile
from irpe_ds.errors import DataError

# Labels of which nearly every one is another come from the wrong column, or are file names.
_UNIQUE_IMAGES, _UNIQUE_SHARE = 20, 0.9
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test"})


class Labelled(NamedTuple):
    """An image with what tells its class."""

    text: str | None
    """A label, or the path of its folder. None: there is none."""
    name: str
    """Its path below its class."""
    file: SourceFile


class Lister:
    """Fills the table `found` with images, by what tells their classes."""

    are_labels = True
    """Whether that is a label, and not a folder."""

    def __init__(self, db: sqlite3.Connection, source: Source, common: tuple[str, ...]) -> None:
        self.db, self.source, self.options = db, source, source.options
        self.root, self.notes = "".join(f"{part}/" for part in common), list[str]()
        self.given: ClassList | None = None
        if self.options.classes is not None:
            self.given = read_classes(self.options.classes)
        elif source.names is not None and self.are_labels:
            self.given = ClassList(source.names, source.path)

    def images(self) -> Iterator[Labelled]:
        """The images with what tells their classes."""
        raise NotImplementedError

    def files(self, order: str = "") -> Iterator[SourceFile]:
        """The images that were listed."""
        columns = "path, file, offset, size, stamp, label"
        for path, file, *place, label in self.db.execute(f"SELECT {columns} FROM files {order}"):
            found = SourceFile(os.fsdecode(path), os.fsdecode(file), *place)
            yield found if label is None else found._replace(label=os.fsdecode(label))

    def _subset(self) -> ImageList | None:
        """The images to take; None: all."""
        path = self.options.subset
        if path is None:
            return None
        lines = read_list(path, "--subset", self.options.image_key)
        named = (Line(line.name or line.label, "") for line in lines)
        return ImageList(self.db, "subset", path, named)

    def where(self, file: SourceFile) -> str:
        """What tells an image's class, in messages."""
        return file.where

    def fill(self) -> tuple[str, ...]:
        """Fill the table; return the class names in label order."""
        known, numbered, subset = dict[str, str | None](), set[bool](), self._subset()
        images = others = taken = 0

        def rows() -> Iterator[tuple[object, ...]]:
            nonlocal images, others, taken
            for text, name, file in self.images():
                images += 1
                if text is not None and text not in known:
                    known[text] = self._class(text, file)
                    if self.are_labels and self.given is None:
                        self._check_same_kind(text, numbered, file)
                if subset is not None and subset.find(file.path) is None:
                    continue
                if text is None:
                    got = f"none in {self.options.labels}"
                    raise DataError("--labels", f"a label for {file.where}", got)
                category = known[text]
                if category is None:
                    others += 1
                    continue
                taken += 1
                names = map(os.fsencode, (category, name, file.file))
                yield *names, file.offset, file.size, file.stamp

        self.db.executemany("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", rows())
        if subset is not None and (line := subset.unused()) is not None:
            raise DataError("--subset", f"names of images of {self.source.paths[0]}", line)
        found = {category for category in known.values() if category is not None}
        if not taken:
            expected = f"images to take in {self.source.paths[0]}"
            raise DataError("--source", expected, f"none of {images}")
        if others:
            self.notes.append(f"{others} images of other classes than --classes has are left out")
        if self.given is not None:
            return self.given.names
        self._check_classes(found, images)
        return in_label_order(found)

    def _class(self, text: str, file: SourceFile) -> str | None:
        """The class that a text means; None: one whose images are left out."""
        label = parse_label(text, self.where(file)) if self.are_labels else text
        if self.given is None:
            return str(label)
        found = self.given.find(text, self.where(file))
        if found is None and isinstance(label, int):
            expected = f"labels below {len(self.given.names)}, the number of --classes"
            raise DataError(self.where(file), expected, text)
        if found is None and self.options.other_classes == "error":
            expected = "a label that --classes has (--other-classes skip leaves others out)"
            raise DataError(self.where(file), expected, text)
        return found

    def _check_same_kind(self, text: str, numbered: set[bool], file: SourceFile) -> None:
        numbered.add(is_number(text))
        if len(numbered) > 1:
            expected = "labels that are all numbers or all names, without --classes"
            raise DataError(self.where(file), expected, text)

    def _check_classes(self, found: set[str], images: int) -> None:
        """Refuse classes that nobody means, where --classes does not give them."""
        if len(found) == 1 and self.options.class_level is None:
            (name,) = found
            raise DataError(
                "--source",
                "images of two classes or more, or --labels, or --classes",
                f"one class, {name}",
            )
        if not self.are_labels:
            return
        if images >= _UNIQUE_IMAGES and len(found) >= _UNIQUE_SHARE * images:
            which = "--labels" if self.options.labels else "--source"
            expected = (
                "labels that many images share (--label-key and --classes tell what they are)"
            )
            got = f"{len(found)} different ones of {images} images, such as {min(found)}"
            raise DataError(which, expected, got)
        numbers = sorted(int(name) for name in found if is_number(name))
        if numbers and numbers != list(range(len(found))):
            seen = f"labels reach {numbers[-1]} (different ones seen: {len(numbers)})"
            raise DataError("--classes", f"the names of all classes, since {seen}", "nothing")


class ByLabel(Lister):
    """Each file has its label beside it."""

    def images(self) -> Iterator[Labelled]:
        for file in self.files():
            assert file.label is not None
            yield Labelled(file.label, file.path, file)


class ByList(Lister):
    """A list tells the label of each file, or of each in the order of their names."""

    def images(self) -> Iterator[Labelled]:
        path = self.options.labels
        assert path is not None
        if is_devkit(path):
            return self._in_order(validation_labels(path))
        lines = read_list(path, "--labels", self.options.image_key, self.options.label_key)
        first = next(lines)
        if first.name:
            return self._by_name(ImageList(self.db, "labels", path, chain([first], lines)))
        return self._in_order([first.label, *(line.label for line in lines)])

    def where(self, file: SourceFile) -> str:
        return f"--labels: {file.path} in {self.options.labels}"

    def _in_order(self, labels: list[str]) -> Iterator[Labelled]:
        path = self.options.labels
        ((count,),) = self.db.execute("SELECT count(*) FROM files")
        if count != len(labels):
            expected = f"{count} labels, one for each image of {self.source.paths[0]}"
            raise DataError("--labels", expected, f"{len(labels)} in {path}")
        if self.given is None and is_number(labels[0]):
            expected = "class names, or the development kit, which explains the numbers"
            raise DataError("--labels", expected, f"numbers in {path}: {labels[0]}")
        for label, file in zip(labels, self.files("ORDER BY path"), strict=True):
            yield Labelled(label, file.path.removeprefix(self.root), file)

    def _by_name(self, listed: ImageList) -> Iterator[Labelled]:
        for file in self.files():
            yield Labelled(listed.find(file.path), file.path.removeprefix(self.root), file)
        if unused := listed.count_unused():
            self.notes.append(f"{unused} lines of {self.options.labels} name no image")


class ByFolder(Lister):
    """The folder that an image is in is its class."""

    are_labels = False

    def images(self) -> Iterator[Labelled]:
        self.root = self._root()
        leaves, leaf = set[str](), self.options.class_level == "leaf"
        for file in self.files():
            path = file.path.removeprefix(self.root)
            folder, _, base = path.rpartition("/")
            top, _, below = path.partition("/")
            leaves.add(folder)
            yield Labelled(folder, base, file) if leaf else Labelled(top, below, file)
        if self.given is None:
            self._check_folders(leaves)
        if self.options.class_level is None and (number := _number_of_leaves(leaves)):
            self.notes.append(
                f"folders in a class folder are of its class; with --class-level leaf there would "
                f"be {number} classes"
            )

    def _root(self) -> str:
        """The folder that the class folders are in, with a slash at its end, or empty."""
        depth = self.root.count("/")
        ((deeper,),) = self.db.execute("SELECT count(*) FROM files WHERE depth > ?", (depth,))
        query = "SELECT path FROM files WHERE depth = ? LIMIT 1"
        loose = [os.fsdecode(path) for (path,) in self.db.execute(query, (depth,))]
        if loose and (deeper or not depth):
            if deeper:
                got: object = self.source.paths[0] / loose[0]
                raise DataError("--source", "every image in a class folder", got)
            empty = self._first_folder("")
            if empty is not None:
                raise _empty(self.source, empty)
            expected = f"{self.source.paths[0]} with one folder per class, or --labels"
            raise DataError("--source", expected, f"{loose[0]} without a folder")
        if loose:  # all in one folder, which is their class
            return self.root[: self.root[:-1].rfind("/") + 1]
        return self.root

    def _first_folder(self, root: str, known: AbstractSet[str] = frozenset()) -> str | None:
        """The first class folder in the root that is none of the known ones."""
        leaf = self.options.class_level == "leaf"
        for (raw,) in self.db.execute("SELECT path FROM folders ORDER BY path"):
            path = os.fsdecode(raw)
            inner = path.removeprefix(root)
            if path.startswith(root) and inner not in known and (leaf or "/" not in inner):
                return path
        return None

    def _check_folders(self, leaves: AbstractSet[str]) -> None:
        """Refuse an empty class folder, and the folder above training and validation."""
        above = {parent for leaf in leaves for parent in _with_parents(leaf)}
        empty = self._first_folder(self.root, above)
        if empty is not None:
            raise _empty(self.source, empty)
        tops = sorted({leaf.partition("/")[0] for leaf in leaves})
        if self.options.class_level or len(tops) < 2:
            return
        if _PARTS.issuperset(name.lower() for name in tops):
            path = self.source.paths[0]
            example = path / self.root / tops[0]
            expected = f"a folder with a folder for each class, such as {example}"
            raise DataError("--source", expected, f"{path} with the folders {', '.join(tops)}")


def _empty(source: Source, folder: str) -> DataError:
    expected = "images in every class folder (--classes FILE allows classes without images)"
    return DataError("--source", expected, source.paths[0] / folder)


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition("/")[0]


def _number_of_leaves(folders: AbstractSet[str]) -> int:
    """How many classes the paths of folders would be, if that is another choice than their tops.

    It is none where no class folder has several folders in it, or these lie beside its images.
    """
    below = Counter(folder.partition("/")[0] for folder in folders if "/" in folder)
    is_choice = any(count > 1 and top not in folders for top, count in below.items())
    return len(folders) if is_choice else 0
