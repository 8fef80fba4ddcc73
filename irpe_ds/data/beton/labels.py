"""The labels of ImageNet's validation images, which are not in class folders."""

import io
import tarfile
from pathlib import Path

from irpe_ds.errors import DataError

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


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
        if all(name.isdecimal() for name in names):
            expected = "class names, or the development kit, which explains the numbers"
            raise DataError("--labels", expected, f"numbers in {path}")
        return names
    synsets = _synsets(kit[META], path)
    try:
        return [synsets[int(number)] for number in kit[GROUND_TRUTH].split()]
    except (KeyError, ValueError) as error:
        raise DataError("--labels", f"numbers in meta.mat of {path}", error) from None


def read_lines(path: Path, where: str) -> list[str]:
    """The non-empty lines of a text file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(where, "a text file with one name per line", f"{path}: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(where, "a text file with one name per line", f"{path}: empty")
    return lines


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("--labels", "the development kit", f"{path}: {error.strerror}") from None


def _unpack(path: Path) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(path) as archive:
            for entry in archive:
                for name in (GROUND_TRUTH, META):
                    if entry.name.endswith(name) and (file := archive.extractfile(entry)):
                        found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError("--labels", "the development kit", f"{path}: {error}") from None
    if len(found) != 2:
        raise DataError("--labels", f"the development kit, with {GROUND_TRUTH} and {META}", path)
    return found


def _synsets(meta: bytes, path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> WordNet ID, from meta.mat."""
    import numpy as np
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(rows)}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError("--labels", f"ILSVRC2012's meta.mat in {path}", error) from None
