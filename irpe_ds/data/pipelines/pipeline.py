"""The two pipelines from sample indices to batches, behind one interface."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from irpe_ds.config import AugmentConfig, DataConfig
from irpe_ds.data.beton.journal import list_images
from irpe_ds.data.beton.manifest import read_hashes, read_manifest
from irpe_ds.data.beton.reader import DatasetInfo, beton_info
from irpe_ds.data.order import Samples, TrainOrder, split
from irpe_ds.data.rng import Keys
from irpe_ds.errors import DataError

Decoded = tuple[torch.Tensor, torch.Tensor]
"""A batch: images (B, 3, H, W) uint8 and labels (B,) int64."""
Batches = Generator[Decoded, None, None]
Part = Literal["train", "val"]

BETON = ".beton"


class Pipeline(Protocol):
    """A data set and a way to decode it."""

    num_samples: int
    """Images in the data set."""
    labels: NDArray[np.int64]
    """(num_samples,)."""
    workers: int
    """Threads or processes that decode."""

    def train(
        self, order: TrainOrder, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """A random crop of each sample, drawn from its key, in order; size is (height, width)."""

    def evaluate(
        self, samples: Samples, *, batch_size: int, size: tuple[int, int], crop: float
    ) -> Batches:
        """The centre crop of each sample, in order; size is (height, width)."""


def open_pipeline(data: DataConfig, part: Part, augment: AugmentConfig | None = None) -> Pipeline:
    """Open data.train or data.val with the pipeline that `data.pipeline` names.

    `ffcv` reads a .beton file, decodes in threads and resizes by area; of `augment` it does the
    crop and the flip, and leaves the rest to the device. `timm` also reads a folder or a .tar with
    one folder per class, and runs timm's own transforms, the reference recipe with its bicubic
    resize, in processes; only random erasing is left to the device.

    Args:
        augment: of training; evaluation does not need it.
    """
    whole = _open(data, data.path(part), f"data.{part}", augment or AugmentConfig())
    if data.val is not None:
        return whole
    return Subset(whole, _split(data, whole.labels)[part])


def _open(data: DataConfig, path: Path, where: str, augment: AugmentConfig) -> Pipeline:
    if data.pipeline == "ffcv":
        from irpe_ds.data.pipelines.ffcv import FFCVPipeline

        options = data.workers, data.scaled_decoding, data.os_cache
        return FFCVPipeline(path, where, augment, *options)
    from irpe_ds.data.pipelines.timm import TimmPipeline

    return TimmPipeline(path, where, augment, data.mean, data.workers)


class Subset:
    """Some images of a data set: sample n is the n-th of them."""

    def __init__(self, whole: Pipeline, samples: Samples) -> None:
        self._whole, self._samples = whole, samples
        self.num_samples, self.labels = len(samples), whole.labels[samples]
        self.workers = whole.workers

    def train(
        self, order: TrainOrder, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """As `Pipeline.train`."""
        order = order._replace(samples=self._samples[order.samples])
        return self._whole.train(order, keys, batch_size=batch_size, size=size)

    def evaluate(
        self, samples: Samples, *, batch_size: int, size: tuple[int, int], crop: float
    ) -> Batches:
        """As `Pipeline.evaluate`."""
        samples = self._samples[samples]
        return self._whole.evaluate(samples, batch_size=batch_size, size=size, crop=crop)


def _split(data: DataConfig, labels: NDArray[np.int64]) -> dict[str, Samples]:
    """The images of either part where data.val is a share of data.train."""
    assert data.val_share is not None  # DataConfig ensures it
    train, val = split(labels, data.val_share, data.val_seed)
    return {"train": train, "val": val}


def dataset_info(data: DataConfig, part: Part) -> DatasetInfo:
    """The contents of data.train or data.val, as its pipeline would read it.

    Raises:
        DataError: it cannot be read, or a class has too few images to share them.
    """
    path, where = data.path(part), f"data.{part}"
    if data.val is not None and (data.pipeline == "ffcv" or path.suffix == BETON):
        return beton_info(path, where)
    from irpe_ds.data.pipelines.timm import open_images

    images = open_images(path, where)
    if data.val is not None:
        return images.info
    alone = np.flatnonzero(np.bincount(images.labels) == 1)
    if len(alone):
        name = images.info.classes[alone[0]] if images.info.classes else int(alone[0])
        expected = f"at least 2 images of every class of {path}, as data.val_share takes one"
        raise DataError("data.train", expected, f"1 of class {name}")
    return replace(images.info, num_samples=len(_split(data, images.labels)[part]))


def val_images(data: DataConfig) -> list[str]:
    """class/name of each image of data.train that is for validation, without data.val, in order.

    Of a .beton file without manifest, the numbers of the samples.
    """
    from irpe_ds.data.pipelines.timm import open_images

    path, where = data.train, "data.train"
    samples = _split(data, open_images(path, where).labels)["val"].tolist()
    if path.suffix == BETON:
        manifest = read_manifest(path)
        names = [line.name for line in read_hashes(path, manifest)] if manifest else []
    else:
        names = [f"{image.category}/{image.name}" for _, image in list_images(path, where)[2]]
    return [names[sample] if names else f"sample {sample}" for sample in samples]
