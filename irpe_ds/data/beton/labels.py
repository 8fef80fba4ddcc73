"""Labels and classes: what a label may be, and the class that it means."""

import re
from collections.abc import Iterable
from pathlib import Path

from irpe_ds.data.beton.manifest import read_manifest
from irpe_ds.errors import DataError
from irpe_ds.files import read_regular

_LIMIT = 1 << 26  # bytes of a list of classes
_SYNSET = re.compile(r"(n[0-9]{8})[\s,]+(.+)")  # a WordNet ID with words, or boxes, after it
_NUMBERED = re.compile(r"(.*\S)\s+([0-9]+)")


def parse_label(text: str, where: object) -> int | str:
    """A label: the number of a class, in digits alone (007 is 7), or a class name.

    Of a synset with words after it (`n01440764 tench, Tinca tinca`), the synset.

    Raises:
        DataError: it is empty, of several lines, or another number, such as -1, 1.0 or 1e5.
    """
    if is_number(text):
        return int(text)
    has_digits, has_letters = any(map(str.isdigit, text)), any(map(str.isalpha, text))
    in_powers = re.fullmatch("[+-]?[0-9.]+[eE][+-]?[0-9]+", text)
    if (has_digits and not has_letters) or in_powers or len(text.splitlines()) != 1:
        raise DataError(where, "a label in digits alone, or a class name", repr(text))
    synset = _SYNSET.fullmatch(text)
    return synset[1] if synset else text


def is_number(text: str) -> bool:
    """Whether a label is the number of a class."""
    return re.fullmatch("[0-9]{1,18}", text) is not None


class ClassList:
    """The classes that there may be, and how labels name them.

    A label is a class's name, its number, or of a line `n01440764 tench, Tinca tinca` also one of
    the words that no other line has.
    """

    def __init__(self, lines: Iterable[str], where: object) -> None:
        names, words = list[str](), dict[str, set[int]]()
        for number, line in enumerate(lines):
            synset = _SYNSET.fullmatch(line)
            names.append(synset[1] if synset else line)
            if synset:
                for word in (synset[2], *map(str.strip, synset[2].split(","))):
                    words.setdefault(word, set()).add(number)
        self.names = tuple(names)
        self._numbers = {word: min(numbers) for word, numbers in words.items() if len(numbers) == 1}
        self._numbers |= {name: number for number, name in enumerate(names)}
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise DataError("--classes", f"every class once in {where}", f"{twice!r} twice")

    def find(self, text: str, where: object) -> str | None:
        """The name of the class that a text means; None if it means none.

        Raises:
            DataError: it is the name of one class and the number of another.
        """
        number = self._numbers.get(text)
        if is_number(text) and int(text) < len(self.names):
            if number not in (None, int(text)):
                expected = "a label that is not both a name in --classes and another's number"
                raise DataError(where, expected, text)
            number = int(text)
        synset = _SYNSET.fullmatch(text)
        if number is None and synset:
            number = self._numbers.get(synset[1])
        return None if number is None else self.names[number]


def read_classes(path: Path) -> ClassList:
    """The classes in a text file: one name a line, in label order; or those of a .beton file.

    After a synset may be words, and after every name its number.

    Raises:
        DataError: it is no text file, or lists a name twice, or has no manifest.
    """
    if path.suffix == ".beton":
        manifest = read_manifest(path)
        if manifest is None:
            raise DataError("--classes", "a .beton file with its manifest", path)
        return ClassList(manifest.classes, path)
    lines = _read_lines(path)
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(found and found[2] == str(number) for number, found in enumerate(numbered)):
        lines = [found[1] for found in numbered if found]  # Places365: /a/airfield 0
    return ClassList((line.removeprefix("/") for line in lines), path)


def in_label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: of numbers without a gap their own, else sorted."""
    found = sorted(names)
    if all(map(is_number, found)):
        by_number = sorted(found, key=int)
        if [int(name) for name in by_number] == list(range(len(found))):
            return tuple(by_number)
    return tuple(found)


def _read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file."""
    expected = "a text file with one name per line"
    try:
        lines = read_regular(path, _LIMIT).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError("--classes", expected, f"{path}: {reason}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise DataError("--classes", expected, f"{path}: empty")
    return lines
