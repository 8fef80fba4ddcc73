"""The two pipelines from sample indices to batches, behind one interface."""

from collections.abc import Generator
from pathlib import Path
from typing import Literal, Protocol

import torch

from irpe_ds.config import AugmentConfig, DataConfig
from irpe_ds.data.beton.reader import DatasetInfo, beton_info
from irpe_ds.data.order import Samples
from irpe_ds.data.rng import Keys

Decoded = tuple[torch.Tensor, torch.Tensor]
"""A batch: images (B, 3, H, W) uint8 and labels (B,) int64."""
Batches = Generator[Decoded, None, None]
Part = Literal["train", "val"]

BETON = ".beton"


class Pipeline(Protocol):
    """A data set and a way to decode it."""

    num_samples: int
    """Images in the data set."""
    workers: int
    """Threads or processes that decode."""

    def train(
        self, samples: Samples, keys: Keys, *, batch_size: int, size: tuple[int, int]
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
    path, where, augment = _path(data, part), f"data.{part}", augment or AugmentConfig()
    if data.pipeline == "ffcv":
        from irpe_ds.data.pipelines.ffcv import FFCVPipeline

        return FFCVPipeline(path, where, augment, data.workers, data.scaled_decoding)
    from irpe_ds.data.pipelines.timm import TimmPipeline

    return TimmPipeline(path, where, augment, data.mean, data.workers)


def dataset_info(data: DataConfig, part: Part) -> DatasetInfo:
    """The contents of data.train or data.val, as its pipeline would read it."""
    path, where = _path(data, part), f"data.{part}"
    if data.pipeline == "ffcv" or path.suffix == BETON:
        return beton_info(path, where)
    from irpe_ds.data.pipelines.timm import open_images

    return open_images(path, where).info


def _path(data: DataConfig, part: Part) -> Path:
    return data.train if part == "train" else data.val
