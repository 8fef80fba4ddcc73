"""Labels of images: what one may be, and those of ImageNet's flat validation archive."""

import gzip
import io
import re
import resource
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from irpe_ds.data.beton.tar import read_tar
from irpe_ds.errors import DataError
from irpe_ds.files import read_regular

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"

_LIMIT = 1 << 26  # bytes of a list of labels, or of the development kit unpacked: 3 MB
_CPU_SECONDS = 30  # to read meta.mat; it takes less than one


def parse_label(text: str, where: object) -> int | str:
    """A label: the number of a class, in digits alone (007 is 7), or a class name.

    Raises:
        DataError: it is empty, of several lines, or another number, such as -1, 1.0 or 1e5.
    """
    if re.fullmatch("[0-9]{1,18}", text):
        return int(text)
    has_digits, has_letters = any(map(str.isdigit, text)), any(map(str.isalpha, text))
    in_powers = re.fullmatch("[+-]?[0-9.]+[eE][+-]?[0-9]+", text)
    if (has_digits and not has_letters) or in_powers or len(text.splitlines()) != 1:
        raise DataError(where, "a label in digits alone, or a class name", repr(text))
    return text


def validation_labels(path: Path) -> list[str]:
    """The class name (synset) of each validation image, in the order of the images' names.

    Args:
        path: the development kit, ILSVRC2012_devkit_t12 or its .tar.gz, with its ground truth in
            numbers and their synsets in meta.mat; or a text file with one synset per line.

    Raises:
        DataError: it is neither.
    """
    if path.is_dir():
        kit = {name: _read(path / name) for name in (GROUND_TRUTH, META)}
    elif ".tar" in path.suffixes or path.suffix == ".tgz":
        kit = _unpack(path)
    else:
        names = read_lines(path, "--labels")
        for number, name in enumerate(names, 1):
            if isinstance(parse_label(name, f"--labels: label {number} in {path}"), int):
                expected = "class names, or the development kit, which explains the numbers"
                raise DataError("--labels", expected, f"numbers in {path}: {name}")
        return names
    synsets = _synsets(kit[META], path)
    numbers = kit[GROUND_TRUTH].decode("ascii", "replace").split()
    unknown = next((number for number in numbers if number not in synsets), None)
    if unknown is not None:
        raise DataError("--labels", f"numbers in meta.mat of {path}", unknown[:20])
    return [synsets[number] for number in numbers]


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names in a text file, in label order.

    Raises:
        DataError: it is no text file, or lists a name twice.
    """
    names = read_lines(path, "--classes")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise DataError("--classes", f"every class once in {path}", f"{twice!r} twice")
    return tuple(names)


def read_lines(path: Path, where: str) -> list[str]:
    """The non-empty lines of a text file."""
    expected = "a text file with one name per line"
    try:
        lines = read_regular(path, _LIMIT).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(where, expected, f"{path}: {error}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise DataError(where, expected, f"{path}: empty")
    return lines


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _LIMIT)
    except OSError as error:
        raise DataError("--labels", "the development kit", f"{path}: {error.strerror}") from None


def _unpack(path: Path) -> dict[str, bytes]:
    data = _read(path)
    if data.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_LIMIT)  # the rest of a longer one is missed by read_tar
        except (OSError, EOFError, zlib.error) as error:
            got = f"{path}: {error}"
            raise DataError("--labels", "the development kit", got) from None
    found = {}
    for entry in read_tar(io.BytesIO(data), f"--labels: {path}", 0, len(data)):
        for name in (GROUND_TRUTH, META):
            if entry.name.endswith(name):
                found[name] = data[entry.offset : entry.offset + entry.size]
    if len(found) != 2:
        raise DataError("--labels", f"the development kit, with {GROUND_TRUTH} and {META}", path)
    return found


def _synsets(meta: bytes, path: Path) -> dict[str, str]:
    """ILSVRC2012_ID, in digits -> WordNet ID, from meta.mat.

    In a process of its own: SciPy (1.17) ends with a segmentation fault on some damaged files.
    """
    limit = resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS)
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), resource.setrlimit, limit) as pool:
            return pool.submit(_read_meta, meta).result()
    except Exception as error:  # SciPy raises whatever it meets
        raise DataError("--labels", f"ILSVRC2012's meta.mat in {path}", error) from None


def _read_meta(meta: bytes) -> dict[str, str]:
    import numpy as np
    from scipy.io import loadmat

    rows = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    synsets = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    if not len(set(synsets.values())) == len(synsets) == len(rows):
        raise ValueError("the same number or synset twice")
    return synsets
