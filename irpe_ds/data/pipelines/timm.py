"""The timm pipeline: Pillow, timm's own transforms, PyTorch's DataLoader.

The reference: slower than FFCV's pipeline, but published numbers come from it, with its bicubic
resizes and its augmentation in Pillow. Reads .beton files, and the folders and archives that they
are made from.
"""

import io
import os
import random
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from irpe_ds.config import AugmentConfig
from irpe_ds.data.beton.format import JPG
from irpe_ds.data.beton.images import DAMAGE
from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.reader import DatasetInfo, read_beton
from irpe_ds.data.beton.sources import Files, Member, open_source
from irpe_ds.data.order import Samples
from irpe_ds.data.parallel import local_share
from irpe_ds.data.pipelines.pipeline import BETON, Batches
from irpe_ds.data.rng import Keys
from irpe_ds.errors import DataError, UserError

Transform = Callable[[Image.Image], Tensor | NDArray[np.uint8]]  # which one: timm's version decides


class Images(Protocol):
    """Images by index, opened with Pillow."""

    info: DatasetInfo
    labels: NDArray[np.int64]
    """(num_samples,)."""

    def open(self, sample: int) -> Image.Image:
        """One image; ValueError or OSError if it is damaged."""

    def name(self, sample: int) -> str:
        """Its name in messages."""


class BetonImages:
    """The images of a .beton file."""

    def __init__(self, path: Path, where: str) -> None:
        self._beton = read_beton(path, where)
        self.info = self._beton.info
        self.labels = self._beton.entries["label"]

    def open(self, sample: int) -> Image.Image:
        """One image; ValueError if its bytes differ from those converted."""
        entry, payload = self._beton.entries[sample], self._beton.payload(sample)
        if not self._beton.is_intact(sample):
            raise ValueError("bytes that differ from those converted")
        if entry["mode"] == JPG:
            return Image.open(io.BytesIO(payload.data))
        return Image.fromarray(payload.reshape(entry["height"], entry["width"], 3))

    def name(self, sample: int) -> str:
        """Its name in messages."""
        return f"{self.info.path}: sample {sample}"


class SourceImages:
    """The images of a folder or archive, read in place, in the order of a conversion.

    Paths and offsets are kept in arrays: lists of objects would be copied into every worker
    process, page by page, as it counts references.
    """

    def __init__(self, path: Path, where: str) -> None:
        try:
            source = open_source([path])
            with closing(Journal(None, {})) as journal:
                classes, _ = journal.list_source(source)
                images = list(journal.members())
        except UserError as error:
            raise DataError(where, error.expected, error.got) from None
        self.info = DatasetInfo(path=path, num_samples=len(images), classes=classes)
        self.labels = np.array([label for label, _ in images], np.int64)
        self._extents = np.array([(m.offset, m.size) for _, m in images], np.int64)
        names = [os.fsencode(member.file) for _, member in images]
        self._names, self._ends = b"".join(names), np.cumsum([0, *map(len, names)])
        self._files = Files(source)

    def open(self, sample: int) -> Image.Image:
        """One image; ValueError if it cannot be read."""
        offset, size = self._extents[sample].tolist()
        member = Member("", "", self._file(sample), offset, size, 0)
        return Image.open(io.BytesIO(self._files.read(member)))

    def name(self, sample: int) -> str:
        """Its name in messages."""
        offset = self._extents[sample, 0]
        return f"{self._file(sample)}" + (f" at byte {offset}" if offset else "")

    def _file(self, sample: int) -> str:
        return os.fsdecode(self._names[self._ends[sample] : self._ends[sample + 1]])


def open_images(path: Path, where: str) -> Images:
    """Open a .beton file, or a folder or archive with one folder per class."""
    return BetonImages(path, where) if path.suffix == BETON else SourceImages(path, where)


class TimmPipeline:
    """A data set with timm's transforms; of AugmentConfig, random erasing is left to the device.

    Args:
        mean: fills the pixels that augmentation uncovers, for pixels in [0, 1].
        workers: decoding processes. None: this rank's share of the cores.
    """

    def __init__(
        self,
        path: Path,
        where: str,
        augment: AugmentConfig,
        mean: tuple[float, float, float],
        workers: int | None,
    ) -> None:
        self._images = open_images(path, where)
        self._augment, self._mean = augment, mean
        self.num_samples = self._images.info.num_samples
        self.workers = workers or local_share(len(os.sched_getaffinity(0)))

    def train(
        self, samples: Samples, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """Bicubic random resized crops, flipped and augmented as timm does."""
        augment = self._augment
        transform = create_transform(
            (3, *size),
            is_training=True,
            use_prefetcher=True,  # timm's switch for uint8 that is normalised on the device
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augment.auto,
            interpolation="bicubic",
            mean=self._mean,
        )
        return self._load(Transformed(self._images, samples, transform, keys), batch_size)

    def evaluate(
        self, samples: Samples, *, batch_size: int, size: tuple[int, int], crop: float
    ) -> Batches:
        """The centre of a bicubic resize to the sides of `size` divided by `crop`."""
        transform = create_transform(
            (3, *size),
            is_training=False,
            use_prefetcher=True,
            interpolation="bicubic",
            crop_pct=crop,
        )
        return self._load(Transformed(self._images, samples, transform, None), batch_size)

    def _load(self, images: "Transformed", batch_size: int) -> Batches:
        loader = DataLoader(
            images,
            batch_size=batch_size,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class Transformed(Dataset):
    """One pass over some samples; each item is a function of its key alone."""

    def __init__(
        self, images: Images, samples: Samples, transform: Transform, keys: Keys | None
    ) -> None:
        self._images, self._samples, self._keys = images, samples, keys
        self._transform = transform

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | DataError:
        """Pixels (3, H, W) uint8 and label.

        Damage is returned, not raised: torch's DataLoader (2.12) raises a worker's exception again
        with the worker's traceback as its message.
        """
        if self._keys is not None:
            seed_generators(int(self._keys[position]))
        sample = int(self._samples[position])
        try:
            image = self._images.open(sample).convert("RGB")
        except DAMAGE as error:
            return DataError(self._images.name(sample), "an undamaged image", error)
        pixels = torch.as_tensor(self._transform(image))
        return pixels, int(self._images.labels[sample])


def collate(items: list[tuple[Tensor, int] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    """A batch in channels_last, as from the FFCV pipeline, or the first error."""
    good = []
    for item in items:
        if isinstance(item, UserError):
            return item
        good.append(item)
    images = torch.stack([pixels for pixels, _ in good])
    labels = torch.tensor([label for _, label in good])
    return images.contiguous(memory_format=torch.channels_last), labels


def ignore_signals(_: int) -> None:
    """Make a worker process ignore the signals that ask a run to stop.

    Launchers and terminals send them to all processes of a run, but a rank finishes its update
    first and needs its workers for that.
    """
    signal.set_wakeup_fd(-1)  # inherited from the rank
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def seed_generators(key: int) -> None:
    """Seed the generators that timm's and torchvision's transforms use, in this process."""
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)
