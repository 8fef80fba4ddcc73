"""A .beton file against its manifest, and every image in it against the decoder."""

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from irpe_ds.data.dataset import Beton, DatasetInfo, open_dataset, read_beton
from irpe_ds.data.ffcv_api import JPG
from irpe_ds.data.images import Jpeg, decode_jpeg
from irpe_ds.data.manifest import file_sha256, read_manifest
from irpe_ds.data.parallel import map_in_order
from irpe_ds.errors import ConfigError


def verify(path: Path, *, workers: int) -> DatasetInfo:
    """Decode every image of a file, and compare it with its manifest where it has one.

    Raises:
        ConfigError: the first damaged sample, or what the manifest says otherwise.
    """
    info = open_dataset(path, str(path))
    beton = read_beton(path, str(path))
    _check_counts(beton)
    check = partial(_decodes, beton)
    with (
        closing(map_in_order(check, range(info.num_samples), workers=workers)) as results,
        tqdm(results, total=info.num_samples, unit="img", disable=None) as progress,
    ):
        for sample, intact in enumerate(progress):
            if not intact:
                label = beton.entries["label"][sample]
                name = info.classes[label] if info.classes else label
                got = f"damage in sample {sample} (class {name})"
                raise ConfigError(path, "images that decode", got)
    if info.sha256 is not None and file_sha256(path) != info.sha256:
        raise ConfigError(path, f"the SHA-256 of its manifest, {info.sha256}", "another")
    return info


def _check_counts(beton: Beton) -> None:
    manifest = read_manifest(beton.path)
    if manifest is None:
        return
    found, counts = np.unique(beton.entries["label"], return_counts=True)
    expected = {label: count for label, count in enumerate(manifest.class_counts) if count}
    if dict(zip(found.tolist(), counts.tolist(), strict=True)) != expected:
        raise ConfigError(beton.path, "as many images of each class as its manifest says", "others")


def _decodes(beton: Beton, sample: int) -> bool:
    """Whether the bytes of this sample are an image of the size that its entry says."""
    entry = beton.entries[sample]
    height, width = int(entry["height"]), int(entry["width"])
    payload = beton.bytes[entry["start"] : entry["start"] + entry["bytes"]]
    if entry["mode"] != JPG:
        return payload.size == 3 * height * width > 0
    try:
        decode_jpeg(Jpeg(payload, height, width))
    except ValueError:
        return False
    return True
