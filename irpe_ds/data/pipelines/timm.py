"""The timm pipeline: Pillow, timm's own transforms, PyTorch's DataLoader.

The reference: slower than FFCV's pipeline, but published numbers come from it, with its bicubic
resizes and its augmentation in Pillow. Reads .beton files, and the folders and archives that they
are made from.
"""

import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomCrop

from irpe_ds.config import AugmentConfig
from irpe_ds.data.beton.format import JPG
from irpe_ds.data.beton.images import DAMAGE, open_image
from irpe_ds.data.beton.journal import list_images
from irpe_ds.data.beton.reader import DatasetInfo, read_beton
from irpe_ds.data.beton.sources import Files, Member
from irpe_ds.data.crops import PADDING
from irpe_ds.data.order import Samples, TrainOrder
from irpe_ds.data.parallel import local_share
from irpe_ds.data.pipelines.pipeline import BETON, Batches
from irpe_ds.data.rgb import to_rgb
from irpe_ds.data.rng import Keys
from irpe_ds.errors import DataError, TrainingError, UserError

_PATIENCE_SECONDS = 30  # without a batch, until a line tells why
_SHARED_MEMORY = "/dev/shm"  # Linux's: where torch puts the batches of worker processes
_QUEUE_BYTES = 1 << 20  # more than the semaphores of all queues take

Transform = Callable[[Image.Image], Tensor | NDArray[np.uint8]]  # which one: timm's version decides


class Images(Protocol):
    """Images by index, opened with Pillow."""

    info: DatasetInfo
    labels: NDArray[np.int64]
    """(num_samples,)."""

    def read(self, sample: int) -> bytes | memoryview:
        """Its stored bytes; ValueError or OSError if they cannot be read."""

    def open(self, sample: int) -> Image.Image:
        """One image; ValueError or OSError if it is damaged."""

    def name(self, sample: int) -> str:
        """Its name in messages."""


class BetonImages:
    """The images of a .beton file."""

    def __init__(self, path: Path, where: str) -> None:
        self.beton = read_beton(path, where)
        self.info = self.beton.info
        self.labels = self.beton.entries["label"]

    def read(self, sample: int) -> memoryview:
        """Its stored bytes: a JPEG, or pixels."""
        return self.beton.payload(sample).data

    def open(self, sample: int) -> Image.Image:
        """One image; ValueError if its bytes differ from those converted."""
        entry, payload = self.beton.entries[sample], self.beton.payload(sample)
        if not self.beton.is_intact(sample, payload):
            raise ValueError("bytes that differ from those converted")
        if entry["mode"] == JPG:
            return open_image(payload.data)
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
        source, classes, images = list_images(path, where)
        self.info = DatasetInfo(path=path, num_samples=len(images), classes=classes)
        self.labels = np.array([label for label, _ in images], np.int64)
        self._extents = np.array([(m.offset, m.size) for _, m in images], np.int64)
        names = [os.fsencode(member.file) for _, member in images]
        self._names, self._ends = b"".join(names), np.cumsum([0, *map(len, names)])
        self._files = Files(source)

    def read(self, sample: int) -> bytes:
        """The bytes of its file; ValueError if they cannot be read."""
        offset, size = self._extents[sample].tolist()
        return self._files.read(Member("", "", self._file(sample), offset, size, 0))

    def open(self, sample: int) -> Image.Image:
        """One image; ValueError if it cannot be read."""
        return open_image(self.read(sample))

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
        self.labels = self._images.labels
        self.workers = workers or local_share(len(os.sched_getaffinity(0)))

    def train(
        self, order: TrainOrder, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """Bicubic random crops, flipped and augmented as timm does."""
        augment = self._augment
        transform: Any = create_transform(
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
        if augment.crop == "simple":  # in the place of the random resized crop
            crop = RandomCrop(size, padding=PADDING, padding_mode="reflect")
            transform.transforms[:1] = [ResizeKeepRatio(size, interpolation="bicubic"), crop]
        return self._load(Transformed(self._images, order.samples, transform, keys), batch_size)

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
        _check_shared_memory()
        others = set(active_children())
        iterator: Any = iter(loader)
        iterator._workers_done_event = DoneEvent(iterator._workers_done_event)
        workers = [process for process in active_children() if process not in others]
        try:
            while (batch := next_batch(iterator, workers)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            # Not when the last reference to it goes, which a traceback may keep to the end of the
            # process: that would wait for ever for its workers, as they ignore SIGTERM.
            with suppress(RuntimeError):  # torch's handler of SIGCHLD raises it
                iterator._shutdown_workers()
            for worker in workers:  # one that was stopped, or hangs
                worker.kill()
                worker.join(1)


class DoneEvent:
    """The event by which torch (2.14) ends its workers, without waiting for ever for its lock.

    Workers take the lock all the time. One that is killed or stopped just then keeps it.
    """

    def __init__(self, event: Any) -> None:
        self._event, self._is_set = event, False

    def is_set(self) -> bool:
        """Whether this process, the only one that does, has set it."""
        return self._is_set

    def set(self) -> None:
        """Tell the workers."""
        self._is_set = True
        setting = Thread(target=self._event.set, daemon=True)
        setting.start()
        setting.join(1)


Loaded = tuple[Tensor, Tensor] | DataError
"""A batch, or why there is none."""


def next_batch(iterator: Iterator[Loaded], workers: list[BaseProcess]) -> Loaded | None:
    """The next batch of a DataLoader, however long it takes; None after the last one.

    Raises:
        TrainingError: a worker died.
    """
    try:
        with _told_of(workers):
            return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:
        with suppress(RuntimeError):  # torch's handler of SIGCHLD: then it has ended
            ending = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ending:
                    worker.join()
        dead = ", ".join(str(worker.pid) for worker in workers if not worker.is_alive())
        reason = str(error).strip() or "connection lost"
        told = f"process {dead} died: {reason}" if dead else reason
        raise TrainingError(f"data.workers: {told}") from None


@contextmanager
def _told_of(workers: list[BaseProcess]) -> Iterator[None]:
    """While entered, a line on stderr every 30 seconds tells the state of the workers.

    By a thread: a DataLoader's own timeout does not cover the moment when it fetches the memory of
    a batch from the worker that made it.
    """
    done = Event()

    def tell() -> None:
        waited = 0
        while not done.wait(_PATIENCE_SECONDS):
            waited += _PATIENCE_SECONDS
            states = {worker.pid: _state(worker.pid) for worker in workers}
            if set(states.values()) == {"?"}:  # torch's handler of SIGCHLD raised before done.set()
                return
            stopped = " ".join(str(pid) for pid, state in states.items() if state == "T")
            told = ", ".join(f"pid {pid} in state {state}" for pid, state in states.items())
            if stopped:
                told = f"pid {stopped} stopped (kill -CONT {stopped} lets it continue)"
            rank = os.environ.get("RANK", "0")
            sys.stderr.write(f"[rank {rank}] no images from data workers for {waited} s: {told}\n")
            sys.stderr.flush()

    Thread(target=tell, name="data workers", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _state(pid: int | None) -> str:
    """A process's state in Linux's letters: T stopped, D waiting for a disk, R running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def _check_shared_memory() -> None:
    """Refuse to start where not even the queues have room: torch would add a traceback."""
    try:
        with tempfile.TemporaryFile(dir=_SHARED_MEMORY) as file:
            os.posix_fallocate(file.fileno(), 0, _QUEUE_BYTES)
    except OSError as error:
        raise _no_room(error.strerror) from None


def _no_room(reason: object) -> DataError:
    where = f"cannot put batches into {_SHARED_MEMORY}: {reason}"
    return DataError(f"{where}; enlarge it (docker run --shm-size=8g), or lower data.workers")


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
            image = to_rgb(self._images.open(sample))
        except DataError as error:  # of the source, not of this image
            return error
        except DAMAGE as error:
            return DataError(self._images.name(sample), "an undamaged image", error)
        pixels = torch.as_tensor(self._transform(image))
        return pixels, int(self._images.labels[sample])


def collate(items: list[tuple[Tensor, int] | DataError]) -> Loaded:
    """A batch in channels_last, as from the FFCV pipeline, or the first error.

    In shared memory already: were it full when the batch is sent, a thread of torch (2.14) would
    print a traceback, and the rank would wait for ever.
    """
    good = []
    for item in items:
        if isinstance(item, UserError):
            return item
        good.append(item)
    images = torch.stack([pixels for pixels, _ in good])
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([label for _, label in good])
    try:
        return images.share_memory_(), labels.share_memory_()
    except RuntimeError as error:
        return _no_room(error)


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
