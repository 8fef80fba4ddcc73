"""Training and validation batches from .beton files."""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import torch
from numba import config

from irpe_ds.config import AugmentConfig
from irpe_ds.data.batches import Batch, BatchIterator
from irpe_ds.data.dataset import read_beton
from irpe_ds.data.order import eval_order, train_order
from irpe_ds.data.views import centre_views, random_views
from irpe_ds.errors import ConfigError


class TrainLoader:
    """Augmented training batches, the same for every number of threads, ranks and restarts.

    The order is a function of (seed, epoch), an image's augmentation one of (seed, epoch, sample).
    The first batch of a process waits for compilation, some seconds.

    Args:
        path: a .beton file.
        batch_size: images per rank and forward pass.
        img_size: height and width of the images, pixels.
        accumulation: forward passes per update.
        workers: decoding threads; None takes this rank's share of the cores.
    """

    def __init__(
        self,
        path: Path,
        *,
        batch_size: int,
        img_size: int | tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int = 1,
        workers: int | None = None,
    ) -> None:
        self._beton = read_beton(path, "data.train")
        self._batch_size, self._accumulation = batch_size, accumulation
        self._rank, self._world_size = rank, world_size
        self._augment, self._seed = augment, seed
        self._size, self.workers = _height_width(img_size), _decoding_threads(workers)
        num_samples = len(self._beton.entries)
        global_batch = batch_size * world_size * accumulation
        if global_batch > num_samples:
            expected = f"at most {num_samples}, the images in {path}"
            raise ConfigError("train.global_batch", expected, global_batch)
        self._passes = num_samples // global_batch * accumulation

    def __len__(self) -> int:
        """Forward passes per epoch and rank; the images of an incomplete update are left out."""
        return self._passes

    def epoch(self, epoch: int, first_pass: int = 0) -> Generator[Batch, None, None]:
        """Yield images (B, 3, H, W) uint8 and labels (B,) int64 of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            first_pass: forward passes to leave out at the beginning; the rest is unchanged.
        """
        samples = train_order(
            len(self._beton.entries),
            batch_size=self._batch_size,
            accumulation=self._accumulation,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
        )[first_pass * self._batch_size :]
        views = random_views(
            samples,
            self._beton.entries["height"][samples],
            self._beton.entries["width"][samples],
            scale=self._augment.scale,
            ratio=self._augment.ratio,
            hflip=self._augment.hflip,
            seed=self._seed,
            epoch=epoch,
        )
        batches = BatchIterator(
            self._beton,
            views,
            batch_size=self._batch_size,
            size=self._size,
            workers=self.workers,
        )
        with closing(batches):
            yield from batches


class EvalLoader:
    """Centre crops of all images in file order, each counted exactly once over all ranks.

    Args:
        crop: share of the image that the largest centred box of this shape keeps, per side.
            The others are those of TrainLoader.
    """

    def __init__(
        self,
        path: Path,
        *,
        batch_size: int,
        img_size: int | tuple[int, int],
        crop: float,
        rank: int,
        world_size: int,
        workers: int | None = None,
    ) -> None:
        self._beton = read_beton(path, "data.val")
        self._batch_size = batch_size
        self._size, self.workers = _height_width(img_size), _decoding_threads(workers)
        samples, valid = eval_order(
            len(self._beton.entries), batch_size=batch_size, rank=rank, world_size=world_size
        )
        self._valid = torch.from_numpy(valid).split(batch_size)
        self._views = centre_views(
            samples,
            self._beton.entries["height"][samples],
            self._beton.entries["width"][samples],
            aspect=self._size[1] / self._size[0],
            share=crop,
        )

    def __len__(self) -> int:
        """Forward passes per rank: the same number on every rank."""
        return len(self._valid)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield images (B, 3, H, W) uint8, labels (B,) int64 and valid (B,) bool.

        Where valid is False, the image only fills the batch and must not be counted.
        """
        batches = BatchIterator(
            self._beton,
            self._views,
            batch_size=self._batch_size,
            size=self._size,
            workers=self.workers,
        )
        with closing(batches):
            for (images, labels), valid in zip(batches, self._valid, strict=True):
                yield images, labels, valid


def _height_width(img_size: int | tuple[int, int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def _decoding_threads(workers: int | None) -> int:
    """The number asked for, or the cores divided by this machine's ranks."""
    most: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # cores, or fewer
    if workers is None:
        # torchrun sets the first, DeepSpeed's launcher the second.
        ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
        return max(1, most // int(ranks))
    if workers > most:
        raise ConfigError("data.workers", f"at most {most}, the cores of this machine", workers)
    return workers
