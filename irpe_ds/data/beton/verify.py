"""Check a data set against its manifest, and decode every image in it."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from irpe_ds.data.beton.format import JPG
from irpe_ds.data.beton.images import check_jpeg
from irpe_ds.data.beton.manifest import (
    MANIFEST,
    SHARDING,
    FileRecord,
    beside,
    file_hashes,
    file_sha256,
    read_hashes,
    read_manifest,
)
from irpe_ds.data.beton.reader import (
    Beton,
    DatasetInfo,
    check_structure,
    read_beton,
    read_metadata,
)
from irpe_ds.data.parallel import map_in_order, progress
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular


def verify(path: Path, *, workers: int, needs_manifest: bool = True) -> DatasetInfo:
    """Decode every image of a file or of a set's shards, and compare them with the manifest.

    Args:
        needs_manifest: whether a missing manifest is an error; if not, images are only decoded.

    Raises:
        DataError: names the first damaged sample, or what differs from the manifest.
    """
    manifest = read_manifest(path)
    if not path.exists() and manifest is None and not beside(path, SHARDING).exists():
        raise DataError(path, "a .beton file", "no such file")
    if manifest is not None:
        for file, record in manifest.files(path):
            _check_labels(file, record, manifest.classes)
    beton = read_beton(path, str(path))
    if manifest is not None:
        counts = np.bincount(beton.entries["label"], minlength=len(manifest.classes))
        if counts.tolist() != list(manifest.class_counts):
            raise DataError(path, "the number of images of each class in its manifest", "others")
    elif needs_manifest:
        expected = f"{beside(path, MANIFEST)}, its manifest (--no-manifest only decodes)"
        raise DataError(path, expected, "no manifest")
    check = partial(_fault, beton)
    with (
        closing(map_in_order(check, range(beton.info.num_samples), workers=workers)) as results,
        progress("verify", beton.info.num_samples) as bar,
    ):
        for sample, fault in enumerate(results):
            if fault:
                raise DataError(path, "undamaged images", f"{_name(beton, sample)}: {fault}")
            bar.update()
    for file, record in manifest.files(path) if manifest is not None else ():
        if file_sha256(file, "hash") != record.sha256:
            expected = f"the SHA-256 of its manifest, {record.sha256}"
            got = "another, although every sample matches: header or padding changed"
            raise DataError(file, expected, got)
    return beton.info


def _check_labels(path: Path, record: FileRecord, classes: Sequence[str]) -> None:
    """Compare every label with the class in the sample's name."""
    try:
        with open_regular(path) as file:
            num_samples, _ = check_structure(file, path, str(path))
            if num_samples != record.num_samples:
                return  # read_beton has a better message
            labels = read_metadata(file, num_samples)["f1"]
    except (OSError, DataError):
        return  # likewise
    for sample, (label, line) in enumerate(
        zip(labels.tolist(), file_hashes(path, record.hashes_sha256), strict=False)
    ):
        known = 0 <= label < len(classes)
        if not known or not line.name.startswith(classes[label] + "/"):
            name = f" ({classes[label]})" if known else ""
            got = f"label {label}{name} in sample {sample} ({line.name})"
            raise DataError(path, "the label of each image's class", got)


def _name(beton: Beton, sample: int) -> str:
    """A sample's name in messages."""
    info = beton.info
    if info.manifest is None:
        return f"sample {sample} (label {beton.entries['label'][sample]})"
    for number, line in enumerate(read_hashes(info.path, info.manifest)):
        if number == sample:
            return f"sample {sample} ({line.name})"
    raise AssertionError(sample)


def _fault(beton: Beton, sample: int) -> str | None:
    """The fault of a sample, or None."""
    entry = beton.entries[sample]
    size = int(entry["height"]), int(entry["width"])
    payload = beton.payload(sample)
    if not beton.is_intact(sample, payload):
        return "bytes that differ from those converted"
    if entry["mode"] != JPG:
        return None if payload.size == 3 * size[0] * size[1] else "bytes that do not fit its size"
    try:
        found = check_jpeg(payload)
    except ValueError as error:
        return str(error)
    return None if found == size else f"an image of {found}, but {size} in its table entry"
