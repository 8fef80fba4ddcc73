"""A thread that decodes views into batches, ahead of its consumer."""

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Lock, Thread

import numba
import numpy as np
import torch

from irpe_ds.data.dataset import Beton
from irpe_ds.data.decode import decode_views
from irpe_ds.data.views import Views
from irpe_ds.errors import ConfigError

Batch = tuple[torch.Tensor, torch.Tensor]

_POLL_SECONDS = 0.1
# Two batches at once would share the same cores, and one of Numba's thread pools (workqueue)
# ends the process when two threads enter it.
_decoding = Lock()


class BatchIterator:
    """Images (B, 3, H, W) uint8 in channels_last and labels (B,) int64 of these views, in order.

    Each batch is memory of its own, pinned where there is a GPU. Whatever the thread raises, the
    consumer gets. Must be closed, which ends the thread.

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
        self._queue: Queue[Batch | BaseException | None] = Queue(ahead)
        self._closed = Event()
        self._thread = Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
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
        """End the thread, at the latest after the batch that it is decoding, and wait for it."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            numba.set_num_threads(self._workers)  # of this thread only
            for first in range(0, len(self._views), self._batch_size):
                batch = self._decode(self._views[first : first + self._batch_size])
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self._put(error)

    def _decode(self, views: Views) -> Batch:
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
            sample = views["sample"][np.flatnonzero(~intact)[0]]
            expected = "images that decode (data_prep/verify.py checks them all)"
            raise ConfigError(self._beton.path, expected, f"damage in sample {sample}")
        return images_BHWC.permute(0, 3, 1, 2), labels

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Queue an item; False when the iterator was closed instead."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False
