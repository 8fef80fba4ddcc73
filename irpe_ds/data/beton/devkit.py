"""The labels of ImageNet's flat validation archive, from the development kit."""

import gzip
import io
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

_LIMIT = 1 << 26  # bytes of the development kit unpacked: 3 MB
_CPU_SECONDS = 30  # to read meta.mat; it takes less than one


def is_devkit(path: Path) -> bool:
    """Whether a path is ILSVRC2012_devkit_t12, or its .tar.gz."""
    return path.is_dir() or ".tar" in path.suffixes or path.suffix == ".tgz"


def validation_labels(path: Path) -> list[str]:
    """The class name (synset) of each validation image, in the order of the images' names.

    The kit has its ground truth in numbers, and their synsets in meta.mat.

    Raises:
        DataError: it cannot be read.
    """
    if path.is_dir():
        kit = {name: _read(path / name) for name in (GROUND_TRUTH, META)}
    else:
        kit = _unpack(path)
    synsets = _synsets(kit[META], path)
    numbers = kit[GROUND_TRUTH].decode("ascii", "replace").split()
    unknown = next((number for number in numbers if number not in synsets), None)
    if unknown is not None:
        raise DataError("--labels", f"numbers in meta.mat of {path}", unknown[:20])
    return [synsets[number] for number in numbers]


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
