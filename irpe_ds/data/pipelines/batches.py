"""A thread that decodes views into batches, ahead of its consumer."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue, SimpleQueue
from threading import Event, Lock, Thread

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from irpe_ds.data.beton.reader import Beton
from irpe_ds.data.crops import Views
from irpe_ds.data.pipelines.decode import decode_views
from irpe_ds.errors import DataError

Decoded = tuple[torch.Tensor, torch.Tensor]
"""A batch: images (B, 3, H, W) uint8 and labels (B,) int64."""
Batches = Generator[Decoded, None, None]

_POLL_SECONDS = 0.1
# Two batches at once would share the same cores, and one of Numba's thread pools (workqueue)
# ends the process when two threads enter it.
_decoding = Lock()


class Threads:
    """Daemon threads that are used again: FFCV's decoder never frees what it keeps per thread."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Callable[[], None]]] = []

    def run(self, task: Callable[[], None]) -> None:
        """Run a task in an idle thread, or in a new one."""
        try:
            tasks = self._idle.pop()
        except IndexError:
            tasks = SimpleQueue()
            Thread(target=self._serve, args=(tasks,), name="decode", daemon=True).start()
        tasks.put(task)

    def _serve(self, tasks: "SimpleQueue[Callable[[], None]]") -> None:
        while True:
            tasks.get()()
            self._idle.append(tasks)


_threads = Threads()


class BatchIterator:
    """Images (B, 3, H, W) uint8 in channels_last and labels (B,) int64 of these views, in order.

    Each batch is memory of its own, pinned where there is a GPU. Whatever the thread raises, the
    consumer gets. Must be closed, which frees the thread.

    Args:
        beton: where the images are.
        views: what to show of them; cut into batches, the last one is what remains.
        batch_size: views per batch.
        size: height and width of the batch's images, pixels.
        workers: threads that decode one batch.
        ahead: batches that may wait for the consumer.
    """

    def __init__(
        self,
        beton: Beton,
        views: Views,
        *,
        batch_size: int,
        size: tuple[int, int],
        workers: int,
        ahead: int = 3,
    ) -> None:
        self._beton, self._views = beton, views
        self._batch_size, self._size, self._workers = batch_size, size, workers
        self._pinned = torch.cuda.is_available()
        self._queue: Queue[Decoded | BaseException | None] = Queue(ahead)
        self._closed, self._ended = Event(), Event()
        _threads.run(self._run)

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
        """End decoding, at the latest after the batch that is being decoded, and wait for that."""
        self._closed.set()
        self._ended.wait()

    def _run(self) -> None:
        try:
            numba.set_num_threads(self._workers)  # of this thread only
            with ThreadPoolExecutor(self._workers) as pool:
                for first in range(0, len(self._views), self._batch_size):
                    views = self._views[first : first + self._batch_size]
                    self._compare(views["sample"], pool)
                    if not self._put(self._decode(views)):
                        return
            self._put(None)
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self._put(error)
        finally:
            self._ended.set()

    def _compare(self, samples: NDArray[np.int64], pool: ThreadPoolExecutor) -> None:
        """Compare the bytes of samples with their hashes, when they are used first."""
        new = samples[~self._beton.compared[samples]]
        for sample, whole in zip(new, pool.map(self._beton.is_whole, new), strict=True):
            if not whole:
                raise _damage(self._beton, sample)
        self._beton.compared[new] = True

    def _decode(self, views: Views) -> Decoded:
        images_BHWC = torch.empty(
            (len(views), *self._size, 3), dtype=torch.uint8, pin_memory=self._pinned
        )
        labels = torch.empty(len(views), dtype=torch.int64, pin_memory=self._pinned)
        labels.numpy()[:] = self._beton.entries["label"][views["sample"]]
        with _decoding:
            intact = decode_views(
                self._beton.bytes, self._beton.entries, views, images_BHWC.numpy()
            )
        if not intact.all():
            raise _damage(self._beton, views["sample"][np.flatnonzero(~intact)[0]])
        return images_BHWC.permute(0, 3, 1, 2), labels

    def _put(self, item: Decoded | BaseException | None) -> bool:
        """Queue an item; False when the iterator was closed instead."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False


def _damage(beton: Beton, sample: int) -> DataError:
    expected = "undamaged images (data_prep/verify.py checks them all)"
    return DataError(beton.info.path, expected, f"damage in sample {sample}")
