"""Two ways from samples to pixels, behind one interface."""

from pathlib import Path
from typing import Protocol

from irpe_ds.config import AugmentConfig
from irpe_ds.data.beton.reader import DatasetInfo, open_dataset, read_beton
from irpe_ds.data.order import Samples
from irpe_ds.data.pipelines.batches import Batches
from irpe_ds.data.pipelines.ffcv import FastDecoder
from irpe_ds.data.pipelines.timm import BETON, ReferenceDecoder, pillow_images
from irpe_ds.data.rng import Keys


class Decoder(Protocol):
    """A set of images and a way to decode them."""

    num_samples: int
    """Images in the set."""
    workers: int
    """Threads or processes that decode."""

    def train(
        self, samples: Samples, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """A random view of each of these samples, drawn from its key, in order."""

    def evaluate(
        self, samples: Samples, *, batch_size: int, size: tuple[int, int], crop: float
    ) -> Batches:
        """The centre crop of each of these samples, in order."""


def open_decoder(
    path: Path,
    where: str,
    *,
    pipeline: str = "ffcv",
    augment: AugmentConfig | None = None,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    workers: int | None = None,
) -> Decoder:
    """Open a set of images.

    Args:
        path: a .beton file; for `timm` also a folder or a .tar with one folder per class.
        where: the configuration key that names it, for errors.
        pipeline: `ffcv` decodes in threads and resizes by area; what AugmentConfig says beyond
            crop and flip is left to the device. `timm` runs timm's own transforms, the reference
            recipe with its bicubic resize, in processes; only erasing is left to the device.
        mean: fills what `timm` uncovers.
        workers: None takes this rank's share of the cores.
    """
    augment = augment or AugmentConfig()
    if pipeline == "ffcv":
        return FastDecoder(read_beton(path, where), augment, workers)
    return ReferenceDecoder(path, where, augment, mean, workers)


def describe(path: Path, where: str, pipeline: str = "ffcv") -> DatasetInfo:
    """What a set of images holds; the arguments of `open_decoder`."""
    if pipeline == "ffcv" or path.suffix == BETON:
        return open_dataset(path, where)
    return pillow_images(path, where).info
