"""The FFCV pipeline: .beton files, decoded in threads, crops resized by area.

A BatchIterator decodes ahead of its consumer, FFCVPipeline chooses the crops.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import Full, Queue
from threading import Event, Lock, Thread

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from irpe_ds.config import AugmentConfig
from irpe_ds.data.beton.format import JPG
from irpe_ds.data.beton.jpeg import ends_as_encoders_end
from irpe_ds.data.beton.reader import Beton, read_beton
from irpe_ds.data.crops import Crops, center_crops, random_resized_crops, simple_crops
from irpe_ds.data.order import BLOCK, Samples, TrainOrder
from irpe_ds.data.parallel import local_share
from irpe_ds.data.pipelines.decoding import WHY_WHOLE, decode_crops
from irpe_ds.data.pipelines.pipeline import Batches, Decoded
from irpe_ds.data.pipelines.reading import damage, read_ahead
from irpe_ds.data.rng import Keys
from irpe_ds.errors import ConfigError

_POLL_SECONDS = 0.1
# Batches decoded at once would share the same cores, and numba's workqueue thread pool (0.68)
# aborts the process when two threads enter it.
_decoding = Lock()


class FFCVPipeline:
    """The images of a .beton file, cropped and flipped; other augmentation is the device's.

    Args:
        workers: decoding threads. None: this rank's share of the cores.
        is_scaled: decode large training images at a part of their size; see `decode_crops`.
        os_cache: whether what has been read stays in the page cache.
    """

    def __init__(
        self,
        path: Path,
        where: str,
        augment: AugmentConfig,
        workers: int | None,
        is_scaled: bool = False,
        os_cache: bool = True,
    ) -> None:
        if is_scaled and WHY_WHOLE:
            raise ConfigError("data.scaled_decoding", "false", f"true, and {WHY_WHOLE}")
        self._is_scaled, self._os_cache = is_scaled, os_cache
        self._beton, self._augment = read_beton(path, where), augment
        self.num_samples = len(self._beton.entries)
        self.labels = self._beton.entries["label"]
        self.workers = _num_threads(workers)

    def train(
        self, order: TrainOrder, keys: Keys, *, batch_size: int, size: tuple[int, int]
    ) -> Batches:
        """Random crops, some of them flipped."""
        entries, augment, samples = self._beton.entries, self._augment, order.samples
        images = samples, entries["height"][samples], entries["width"][samples], keys
        if augment.crop == "simple":
            crops = simple_crops(*images, size=size, hflip=augment.hflip)
        else:
            crops = random_resized_crops(
                *images, scale=augment.scale, ratio=augment.ratio, hflip=augment.hflip
            )
        return self._decode(crops, order.blocks, batch_size, size, self._is_scaled)

    def evaluate(
        self, samples: Samples, *, batch_size: int, size: tuple[int, int], crop: float
    ) -> Batches:
        """The largest centred box of this shape, its sides times `crop`."""
        entries = self._beton.entries
        crops = center_crops(
            samples,
            entries["height"][samples],
            entries["width"][samples],
            aspect=size[1] / size[0],
            share=crop,
        )
        return self._decode(crops, samples // BLOCK, batch_size, size)

    def _decode(
        self,
        crops: Crops,
        blocks: NDArray[np.int64],
        batch_size: int,
        size: tuple[int, int],
        is_scaled: bool = False,
    ) -> Batches:
        batches = BatchIterator(
            self._beton,
            crops,
            blocks,
            batch_size=batch_size,
            size=size,
            workers=self.workers,
            is_scaled=is_scaled,
            os_cache=self._os_cache,
        )
        with closing(batches):
            yield from batches


def _num_threads(workers: int | None) -> int:
    """The number asked for, or the cores divided by the ranks on this machine.

    Raises:
        ConfigError: there are more threads than cores, which numba refuses.
    """
    cores: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if workers is None:
        return local_share(cores)
    if workers > cores:
        raise ConfigError("data.workers", f"at most {cores}, the cores of this machine", workers)
    return workers


class BatchIterator:
    """Decodes crops in a thread, ahead of its consumer.

    Yields images (B, 3, H, W) uint8 in channels_last and labels (B,) int64, in order. Each batch
    has memory of its own, pinned if there is a GPU. The thread's exceptions are raised in the
    consumer. Must be closed, which ends the thread.

    Args:
        crops: the images to decode, cut into batches; the last batch may be smaller.
        blocks: which of them to read together; see `read_ahead`.
        batch_size: images per batch.
        size: height and width of the batch's images, pixels.
        workers: threads that decode one batch.
        is_scaled: as in `decode_crops`.
        os_cache: as in `read_ahead`.
        ahead: batches that may wait for the consumer.
    """

    def __init__(
        self,
        beton: Beton,
        crops: Crops,
        blocks: NDArray[np.int64],
        *,
        batch_size: int,
        size: tuple[int, int],
        workers: int,
        is_scaled: bool = False,
        os_cache: bool = True,
        ahead: int = 3,
    ) -> None:
        self._beton, self._crops, self._blocks = beton, crops, blocks
        self._batch_size, self._size, self._workers = batch_size, size, workers
        self._is_scaled, self._os_cache = is_scaled, os_cache
        self._pinned = torch.cuda.is_available()
        self._queue: Queue[Decoded | BaseException | None] = Queue(ahead)
        self._closed = Event()
        self._thread = Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Decoded]:
        return self

    def __next__(self) -> Decoded:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, tuple):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop decoding and wait until the thread has ended: at most for the present batch."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            numba.set_num_threads(self._workers)  # of this thread only
            stored = read_ahead(
                self._beton,
                self._crops["sample"],
                self._blocks,
                batch_size=self._batch_size,
                os_cache=self._os_cache,
            )
            with closing(stored):
                for number, batch in enumerate(stored):
                    first = number * self._batch_size
                    crops = self._crops[first : first + self._batch_size]
                    if not self._put(self._decode(crops, *batch)):
                        return
            self._put(None)
        except BaseException as error:  # whatever it is, the consumer gets it
            self._put(error)

    def _decode(
        self, crops: Crops, payloads: NDArray[np.uint8], entries: NDArray[np.void]
    ) -> Decoded:
        images_BHWC = torch.empty(
            (len(crops), *self._size, 3), dtype=torch.uint8, pin_memory=self._pinned
        )
        labels = torch.empty(len(crops), dtype=torch.int64, pin_memory=self._pinned)
        labels.numpy()[:] = entries["label"]
        in_batch = crops.copy()
        in_batch["sample"] = np.arange(len(crops))
        with _decoding:
            unhashed = self._beton.hashes is None
            clean = decode_crops(
                payloads, entries, in_batch, images_BHWC.numpy(), self._is_scaled, unhashed
            )
            for n in np.flatnonzero(~clean):
                again = in_batch[n : n + 1], images_BHWC.numpy()[n : n + 1], self._is_scaled, False
                if not (
                    unhashed
                    and self._has_leftover(payloads, entries[n])
                    and decode_crops(payloads, entries, *again).all()
                ):
                    raise damage(self._beton, crops["sample"][n])
        return images_BHWC.permute(0, 3, 1, 2), labels

    def _has_leftover(self, payloads: NDArray[np.uint8], entry: np.void) -> bool:
        """Whether an image only has bytes that no pixel needs; slow."""
        data = payloads[entry["start"] : entry["start"] + entry["bytes"]]
        size = int(entry["height"]), int(entry["width"])
        return bool(entry["mode"] == JPG) and ends_as_encoders_end(data, *size)

    def _put(self, item: Decoded | BaseException | None) -> bool:
        """Queue an item; False when the iterator was closed instead."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False
