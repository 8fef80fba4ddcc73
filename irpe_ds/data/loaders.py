"""Training and validation batches: which images, in which order, on which rank."""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import torch

from irpe_ds.config import AugmentConfig, DataConfig
from irpe_ds.data.order import TrainOrder, eval_order, train_order
from irpe_ds.data.pipelines.pipeline import open_pipeline
from irpe_ds.data.rng import Keys, image_keys
from irpe_ds.errors import ConfigError


class Batch(NamedTuple):
    """Images of one forward pass of one rank."""

    images: torch.Tensor
    """(B, 3, H, W) uint8."""
    labels: torch.Tensor
    """(B,) int64."""
    keys: Keys
    """(B,) uint64 on the host: each image's key for the random numbers of its augmentation."""


class TrainLoader:
    """Augmented training batches, the same for every number of workers, ranks and restarts.

    The order is a function of (seed, epoch), an image's augmentation one of (seed, epoch, sample,
    repeat). The first batch of a process waits for compilation, some seconds.

    Args:
        data: names the training set and the pipeline.
        batch_size: images per rank and forward pass.
        img_size: height and width of the images, pixels.
        accumulation: forward passes per update.

    Raises:
        ConfigError: an update needs more images than there are.
        DataError: the data set cannot be read.
    """

    def __init__(
        self,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        batch_size: int,
        img_size: tuple[int, int],
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int = 1,
    ) -> None:
        self._pipeline = open_pipeline(data, "train", augment)
        self._batch_size, self._accumulation = batch_size, accumulation
        self._rank, self._world_size = rank, world_size
        self._repeats, self._seed = augment.repeats, seed
        self._window = data.mixed
        self._size, self.workers = img_size, self._pipeline.workers
        global_batch = batch_size * world_size * accumulation
        if global_batch > self._pipeline.num_samples:
            expected = f"at most {self._pipeline.num_samples}, the images in {data.train}"
            raise ConfigError("train.global_batch", expected, global_batch)
        self._passes = self._pipeline.num_samples // global_batch * accumulation

    def __len__(self) -> int:
        """Forward passes per epoch and rank; the images of an incomplete update are left out."""
        return self._passes

    def epoch(
        self, epoch: int, first_pass: int = 0, img_size: tuple[int, int] | None = None
    ) -> Generator[Batch, None, None]:
        """Yield the batches of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            first_pass: forward passes to skip at the beginning; the rest is unchanged.
            img_size: height and width in this epoch. None: the loader's.
        """
        order = train_order(
            self._pipeline.num_samples,
            batch_size=self._batch_size,
            accumulation=self._accumulation,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
            repeats=self._repeats,
            window=self._window,
        )
        order = TrainOrder(*(part[first_pass * self._batch_size :] for part in order))
        keys = image_keys(order.samples, seed=self._seed, epoch=epoch, repeats=order.repetitions)
        size = img_size or self._size
        batches = self._pipeline.train(order, keys, batch_size=self._batch_size, size=size)
        with closing(batches):
            for number, (images, labels) in enumerate(batches):
                first = number * self._batch_size
                yield Batch(images, labels, keys[first : first + self._batch_size])


class EvalLoader:
    """Centre crops of all images in file order, each counted exactly once over all ranks.

    Args:
        data: names the validation set, the pipeline and the share of the image that is kept.
        batch_size: images per rank and forward pass.
        img_size: height and width of the images, pixels.

    Raises:
        DataError: the data set cannot be read.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        batch_size: int,
        img_size: tuple[int, int],
        rank: int,
        world_size: int,
    ) -> None:
        self._pipeline = open_pipeline(data, "val")
        self._batch_size, self._crop = batch_size, data.val_crop
        self._size, self.workers = img_size, self._pipeline.workers
        self._samples, valid = eval_order(
            self._pipeline.num_samples, batch_size=batch_size, rank=rank, world_size=world_size
        )
        self._valid = torch.from_numpy(valid).split(batch_size)

    def __len__(self) -> int:
        """Forward passes per rank: the same number on every rank."""
        return len(self._valid)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield images (B, 3, H, W) uint8, labels (B,) int64 and valid (B,) bool.

        An image whose valid is False only fills the batch and must not be counted.
        """
        batches = self._pipeline.evaluate(
            self._samples, batch_size=self._batch_size, size=self._size, crop=self._crop
        )
        with closing(batches):
            for (images, labels), valid in zip(batches, self._valid, strict=True):
                yield images, labels, valid
