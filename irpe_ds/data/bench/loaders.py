"""The loaders that irpe_ds.data.bench times, each started in a process of its own."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from irpe_ds.errors import ConfigError

# Nothing that starts threads is imported above: that is the candidates' business.

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # s, the resolution of CPU times

Epoch = Callable[[], int]
"""Passes over the data once and returns how many images came."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every loader gets."""

    folder: Path
    """The ImageFolder."""
    beton: Path
    """The same images as .beton, every JPEG as it was."""
    workers: int
    """Decoding threads or processes."""
    size: int
    """Height and width of the images, pixels."""
    batch: int
    """Images per batch; an incomplete one is left out."""


def ours(setting: Setting) -> Epoch:
    """Our TrainLoader, decoding in threads."""
    loader, epochs = _train_loader(setting), itertools.count()
    return lambda: sum(len(batch[0]) for batch in loader.epoch(next(epochs)))


def ours_normalized(setting: Setting) -> Epoch:
    """The same, normalised on the CPU in the consumer."""
    normalize, loader, epochs = _normalize(setting), _train_loader(setting), itertools.count()
    return lambda: sum(len(normalize(batch[0])) for batch in loader.epoch(next(epochs)))


def ours_augmented(setting: Setting) -> Epoch:
    """The same, with three-augment on the CPU in the consumer, then normalised."""
    from irpe_ds.config import AugmentConfig, DataConfig
    from irpe_ds.data.augment.policies import Augment

    data = DataConfig(train=setting.beton, val=setting.beton)
    augment = Augment(AugmentConfig(auto="3a"), data.mean)
    normalize, loader, epochs = _normalize(setting), _train_loader(setting), itertools.count()
    return lambda: sum(
        len(normalize(augment(batch.images, batch.keys))) for batch in loader.epoch(next(epochs))
    )


def _train_loader(setting: Setting) -> Any:
    from irpe_ds.config import AugmentConfig
    from irpe_ds.data.loaders import TrainLoader

    return TrainLoader(
        setting.beton,
        batch_size=setting.batch,
        img_size=setting.size,
        augment=AugmentConfig(),
        seed=0,
        rank=0,
        world_size=1,
        workers=setting.workers,
    )


def _normalize(setting: Setting) -> Any:
    import torch

    from irpe_ds.config import DataConfig
    from irpe_ds.training.batch import Normalize

    data = DataConfig(train=setting.beton, val=setting.beton)
    return Normalize(data, torch.device("cpu"))


def ffcv_loader(setting: Setting) -> Epoch:
    """FFCV's own Loader on the same file."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((setting.size, setting.size))
    loader = Loader(
        os.fspath(setting.beton),
        batch_size=setting.batch,
        num_workers=setting.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return lambda: sum(len(images) for images, _ in loader)


def torchvision_loader(setting: Setting) -> Epoch:
    """torchvision's ImageFolder with PyTorch's DataLoader, decoding in processes."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(setting.size),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    loader = DataLoader(
        ImageFolder(setting.folder, transforms.Compose(steps)),
        batch_size=setting.batch,
        shuffle=True,
        num_workers=setting.workers,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: sum(len(images) for images, _ in loader)


def decode_only(setting: Setting) -> Epoch:
    """Every image decoded at full size and dropped: what no loader of these files can exceed."""
    import numba
    import numpy as np

    from irpe_ds.data.beton.format import JPG, imdecode
    from irpe_ds.data.beton.reader import read_beton

    beton = read_beton(setting.beton, "--data")
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
        numba.set_num_threads(setting.workers)
        if decode(beton.bytes, jpegs):
            raise ConfigError("--data", "undamaged images", setting.folder)
        return len(jpegs)

    return epoch


LOADERS: dict[str, Callable[[Setting], Epoch]] = {
    "ours": ours,
    "ffcv": ffcv_loader,
    "torchvision": torchvision_loader,
    "decode only": decode_only,
    "ours, normalised": ours_normalized,
    "ours, 3a, normalised": ours_augmented,
}


@contextmanager
def started(
    name: str, prepare: Callable[[Setting], Epoch], setting: Setting
) -> Iterator[Callable[[], tuple[float, float]]]:
    """A loader in a process of its own, warmed up; calling it times an epoch there.

    It returns images per second, and per second of CPU time.
    """
    here, there = multiprocessing.get_context("spawn").Pipe()

    def ask(question: bool) -> Any:
        try:
            here.send(question)
            return here.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{name}: its process ended, for the reason above") from None

    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(there, prepare, setting)
    )
    process.start()
    there.close()
    try:
        ask(True)
        yield partial(ask, True)
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, prepare: Callable[[Setting], Epoch], setting: Setting) -> None:
    """In the loader's process: prepare, then time one epoch per message until there are no more."""
    connection.recv()
    epoch = prepare(setting)
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
    """CPU time so far of this process and of those that it started, such as the DataLoader's."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += _TICK * (int(fields[11]) + int(fields[12]))
    return total
