"""The loaders that irpe_ds.data.bench times, each in its own process."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from irpe_ds.errors import DataError

# Nothing imported above starts threads: the candidates do.

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # s, the resolution of CPU times

Epoch = Callable[[], int]
"""Passes over the data once and returns the number of images."""


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """The same task for every loader."""

    folder: Path
    """The ImageFolder."""
    beton: Path
    """The same images as .beton."""
    workers: int
    """Decoding threads or processes."""
    size: int
    """Height and width of the images, pixels."""
    batch: int
    """Images per batch; an incomplete one is left out."""
    is_scaled: bool = False
    """Whether our loader decodes large images at a part of their size."""
    order: Literal["global", "blocks"] = "global"
    window: int = 1
    os_cache: bool = True
    """Keys of the section `data` for our loader."""

    @property
    def data(self) -> Any:
        """The configuration of our loader."""
        from irpe_ds.config import DataConfig

        return DataConfig(
            train=self.beton,
            val=self.beton,
            workers=self.workers,
            scaled_decoding=self.is_scaled,
            order=self.order,
            window=self.window,
            os_cache=self.os_cache,
        )


def ours(spec: LoaderSpec) -> Epoch:
    """Our TrainLoader, decoding in threads."""
    loader, epochs = _train_loader(spec), itertools.count()
    return lambda: sum(len(batch[0]) for batch in loader.epoch(next(epochs)))


def ours_normalized(spec: LoaderSpec) -> Epoch:
    """Our TrainLoader, with normalisation on the CPU in the consumer."""
    normalize, loader, epochs = _normalize(spec), _train_loader(spec), itertools.count()
    return lambda: sum(len(normalize(batch[0])) for batch in loader.epoch(next(epochs)))


def ours_augmented(spec: LoaderSpec) -> Epoch:
    """Our TrainLoader, with three-augment and normalisation on the CPU in the consumer."""
    from irpe_ds.config import AugmentConfig
    from irpe_ds.data.augment.policies import Augment

    augment = Augment(AugmentConfig(auto="3a"), spec.data.mean)
    normalize, loader, epochs = _normalize(spec), _train_loader(spec), itertools.count()
    return lambda: sum(
        len(normalize(augment(batch.images, batch.keys))) for batch in loader.epoch(next(epochs))
    )


def ours_scaled(spec: LoaderSpec) -> Epoch:
    """Our TrainLoader, which decodes large images at a part of their size."""
    return ours(replace(spec, is_scaled=True))


def _train_loader(spec: LoaderSpec) -> Any:
    from irpe_ds.config import AugmentConfig
    from irpe_ds.data.loaders import TrainLoader

    return TrainLoader(
        spec.data,
        AugmentConfig(),
        batch_size=spec.batch,
        img_size=(spec.size, spec.size),
        seed=0,
        rank=0,
        world_size=1,
    )


def _normalize(spec: LoaderSpec) -> Any:
    import torch

    from irpe_ds.training.batch import Normalize

    return Normalize(spec.data, torch.device("cpu"))


def ffcv_loader(spec: LoaderSpec, order: str = "RANDOM", os_cache: bool = True) -> Epoch:
    """FFCV's own Loader on the same file."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((spec.size, spec.size))
    loader = Loader(
        os.fspath(spec.beton),
        batch_size=spec.batch,
        num_workers=spec.workers,
        os_cache=os_cache,
        order=OrderOption[order],
        drop_last=True,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return lambda: sum(len(images) for images, _ in loader)


def torchvision_loader(spec: LoaderSpec) -> Epoch:
    """torchvision's ImageFolder with PyTorch's DataLoader, decoding in processes."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(spec.size),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    loader = DataLoader(
        ImageFolder(spec.folder, transforms.Compose(steps)),
        batch_size=spec.batch,
        shuffle=True,
        num_workers=spec.workers,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: sum(len(images) for images, _ in loader)


def decode_only(spec: LoaderSpec) -> Epoch:
    """Decode every image at full size and drop it: an upper bound for loaders of these files."""
    import numba
    import numpy as np

    from irpe_ds.data.beton.format import JPG, imdecode
    from irpe_ds.data.beton.reader import read_beton

    beton, file = read_beton(spec.beton, "--data"), np.memmap(spec.beton, np.uint8, "r")
    jpegs = beton.entries[beton.entries["mode"] == JPG]
    native = numba.njit(nogil=True)(imdecode)

    @numba.njit(nogil=True, parallel=True)
    def decode(file, entries):  # type: ignore[no-untyped-def]
        failed = 0
        for index in numba.prange(len(entries)):
            entry = entries[index]
            data = file[entry["start"] : entry["start"] + entry["bytes"]]
            height, width = np.int64(entry["height"]), np.int64(entry["width"])
            image = np.empty((height, width, 3), np.uint8)
            status = native(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
            failed += status != 0
        return failed

    def epoch() -> int:
        numba.set_num_threads(spec.workers)
        if decode(file, jpegs):
            raise DataError("--data", "undamaged images", spec.folder)
        return len(jpegs)

    return epoch


LOADERS: dict[str, Callable[[LoaderSpec], Epoch]] = {
    "ours": ours,
    "ours, scaled": ours_scaled,
    "ffcv": ffcv_loader,
    "torchvision": torchvision_loader,
    "decode only": decode_only,
    "ours, normalised": ours_normalized,
    "ours, 3a, normalised": ours_augmented,
}


@contextmanager
def started(
    name: str, prepare: Callable[[LoaderSpec], Epoch], spec: LoaderSpec
) -> Iterator[Callable[[], tuple[float, float]]]:
    """Start a loader in its own process and warm it up; each call times an epoch there.

    A call returns images per second, and per second of CPU time.
    """
    here, there = multiprocessing.get_context("spawn").Pipe()

    def ask(question: bool) -> Any:
        try:
            here.send(question)
            return here.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{name}: its process died, see above") from None

    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(there, prepare, spec)
    )
    process.start()
    there.close()
    try:
        ask(True)
        yield partial(ask, True)
    finally:
        here.close()
        process.join()


def _serve(
    connection: Connection, prepare: Callable[[LoaderSpec], Epoch], spec: LoaderSpec
) -> None:
    """In the loader's process: prepare, then time one epoch per message."""
    connection.recv()
    epoch = prepare(spec)
    import torch

    torch.set_num_threads(1)  # more would compete with the decoders for the same cores
    epoch()
    connection.send(None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        start, start_cpu = time.perf_counter(), _cpu_seconds()
        images = epoch()
        seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - start_cpu
        connection.send((images / seconds, images / max(cpu_seconds, _TICK)))


def _cpu_seconds() -> float:
    """CPU time so far of this process and its children, such as the DataLoader's workers."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += _TICK * (int(fields[11]) + int(fields[12]))
    return total
