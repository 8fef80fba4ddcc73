"""A .beton file against its manifest, and every image in it against the decoder."""

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from irpe_ds.data.beton.format import ENTRY_TYPE, HEAD_BYTES, JPG, HeaderType
from irpe_ds.data.beton.images import check_jpeg
from irpe_ds.data.beton.manifest import (
    MANIFEST,
    Manifest,
    beside,
    file_sha256,
    read_hashes,
    read_manifest,
)
from irpe_ds.data.beton.reader import Beton, DatasetInfo, read_beton
from irpe_ds.data.parallel import map_in_order, progress
from irpe_ds.errors import DataError


def verify(path: Path, *, workers: int, needs_manifest: bool = True) -> DatasetInfo:
    """Decode every image of a file, and compare it with its manifest.

    Args:
        needs_manifest: whether a file without one is an error, or decoded only.

    Raises:
        DataError: the first damaged sample by its name, or what the manifest says otherwise.
    """
    manifest = read_manifest(path) if path.exists() else None
    if manifest is not None:
        _check_labels(path, manifest)
    beton = read_beton(path, str(path))
    if manifest is None and needs_manifest:
        expected = f"{beside(path, MANIFEST)}, its manifest (--no-manifest decodes only)"
        raise DataError(path, expected, "none")
    check = partial(_fault, beton)
    with (
        closing(map_in_order(check, range(beton.info.num_samples), workers=workers)) as results,
        progress("verify", beton.info.num_samples) as bar,
    ):
        for sample, fault in enumerate(results):
            if fault:
                raise DataError(path, "undamaged images", f"{_name(beton, sample)}: {fault}")
            bar.update()
    if manifest is not None and file_sha256(path, "hash") != manifest.sha256:
        expected = f"the SHA-256 of its manifest, {manifest.sha256}"
        raise DataError(path, expected, "another, though every sample is as it was")
    return beton.info


def _check_labels(path: Path, manifest: Manifest) -> None:
    """Compare every label with the class that the sample was converted from."""
    header = np.fromfile(path, HeaderType, 1)
    if path.stat().st_size != manifest.size or header["num_samples"] != manifest.num_samples:
        return  # read_beton says it better
    labels = np.fromfile(path, ENTRY_TYPE, manifest.num_samples, offset=HEAD_BYTES)["f1"]
    for sample, (label, line) in enumerate(
        zip(labels.tolist(), read_hashes(path, manifest), strict=True)
    ):
        known = 0 <= label < len(manifest.classes)
        if not known or not line.name.startswith(manifest.classes[label] + "/"):
            name = f" ({manifest.classes[label]})" if known else ""
            got = f"label {label}{name} in sample {sample} ({line.name})"
            raise DataError(path, "the label of each image's class", got)
    counts = np.bincount(labels, minlength=len(manifest.classes))
    if counts.tolist() != list(manifest.class_counts):
        raise DataError(path, "as many images of each class as its manifest says", "others")


def _name(beton: Beton, sample: int) -> str:
    """How to speak of a sample."""
    info = beton.info
    if info.manifest is None:
        return f"sample {sample} (label {beton.entries['label'][sample]})"
    for number, line in enumerate(read_hashes(info.path, info.manifest)):
        if number == sample:
            return f"sample {sample} ({line.name})"
    raise AssertionError(sample)


def _fault(beton: Beton, sample: int) -> str | None:
    """What is wrong with the bytes of a sample, if anything."""
    entry = beton.entries[sample]
    size = int(entry["height"]), int(entry["width"])
    payload = beton.payload(sample)
    if not beton.is_whole(sample):
        return "other bytes than were converted"
    if entry["mode"] != JPG:
        return None if payload.size == 3 * size[0] * size[1] else "fewer or more bytes than pixels"
    try:
        found = check_jpeg(payload)
    except ValueError as error:
        return str(error)
    return None if found == size else f"an image of {found}, its entry says {size}"
