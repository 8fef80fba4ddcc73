"""The FFCV pipeline: .beton files, decoded in threads, crops resized by area.

decode_crops fills a batch, a BatchIterator decodes ahead of its consumer, FFCVPipeline chooses
the crops.
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
from irpe_ds.data.beton.format import JPG, resize_crop
from irpe_ds.data.beton.jpeg import DAMAGED, LEFTOVER, ends_as_encoders_end
from irpe_ds.data.beton.jpeg import decode as decode_whole
from irpe_ds.data.beton.reader import Beton, read_beton
from irpe_ds.data.crops import Crops, center_crops, random_resized_crops, simple_crops
from irpe_ds.data.order import BLOCK, Samples, TrainOrder
from irpe_ds.data.parallel import local_share
from irpe_ds.data.pipelines import jpeg
from irpe_ds.data.pipelines.pipeline import Batches, Decoded
from irpe_ds.data.pipelines.reading import damage, read_ahead
from irpe_ds.data.rng import Keys
from irpe_ds.errors import ConfigError, UserError

_POLL_SECONDS = 0.1
MARGIN = 64
"""Pixels at most that `decode_box` adds on a side of a box: two of a JPEG's largest units."""
# Batches decoded at once would share the same cores, and numba's workqueue thread pool (0.68)
# aborts the process when two threads enter it.
_decoding = Lock()

WHY_WHOLE: str | None = None
"""Why whole images are decoded, by FFCV's decoder, instead of crops; None where crops are."""
try:
    _decode_box, _decode_reduced, _reduce = jpeg.load()
except UserError as error:
    WHY_WHOLE = str(error)
_resize_crop = numba.njit(nogil=True)(resize_crop)


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


@numba.njit(nogil=True, parallel=True)
def decode_crops(
    file: NDArray[np.uint8],
    entries: NDArray[np.void],
    crops: Crops,
    images_BHWC: NDArray[np.uint8],
    is_scaled: bool,
    to_end: bool,
) -> NDArray[np.bool_]:
    """Decode each image, crop it, resize the crop by area, flip and shift it where asked.

    Compiled at the first call in a process, which takes seconds.

    Args:
        file: stored images, one after the other, (bytes,).
        entries: ENTRY of every sample in them (irpe_ds.data.beton.reader).
        crops: CROP of the images to decode, (B,); boxes lie within their images.
        images_BHWC: receives the pixels.
        is_scaled: decode a JPEG at 1/2, 1/4 or 1/8 of its size where the crop is then no smaller
            than `images_BHWC`, with other pixels.
        to_end: look for damage below the crop too, and take bytes left over before the end of a
            JPEG for it.

    Returns:
        (B,) whether each image decoded cleanly; otherwise its pixels are undefined.
    """
    clean = np.zeros(len(crops), np.bool_)
    for position in numba.prange(len(crops)):
        crop = crops[position]
        entry = entries[crop["sample"]]
        data = file[entry["start"] : entry["start"] + entry["bytes"]]
        box = np.array((crop["top"], crop["left"], crop["height"], crop["width"]), np.int64)
        target = images_BHWC[position]
        if entry["mode"] == JPG:
            clean[position] = _decode_jpeg(
                data, entry, box, target, crop["flip"], is_scaled, to_end
            )
        elif data.size == np.int64(entry["height"]) * np.int64(entry["width"]) * 3:
            image = data.reshape((np.int64(entry["height"]), np.int64(entry["width"]), 3))
            _resize_pixels(image, box, target, crop["flip"])
            clean[position] = True
        if crop["shift_down"] or crop["shift_right"]:
            right = -crop["shift_right"] if crop["flip"] else crop["shift_right"]
            _shift(target, crop["shift_down"], right)  # of what is flipped already
    return clean


@numba.njit(nogil=True)
def _shift(image_HWC: NDArray[np.uint8], down: int, right: int) -> None:
    """Move the window over the image, in place; beyond a border its pixels are mirrored."""
    height, width, channels = image_HWC.shape
    before = image_HWC.copy()
    for row in range(height):
        source_row = height - 1 - abs(height - 1 - abs(row + down))
        for column in range(width):
            source_column = width - 1 - abs(width - 1 - abs(column + right))
            for channel in range(channels):
                image_HWC[row, column, channel] = before[source_row, source_column, channel]


@numba.njit(nogil=True)
def _decode_whole(
    data: NDArray[np.uint8],
    entry: np.void,
    box: NDArray[np.int64],
    target: NDArray[np.uint8],
    flip: int,
    is_scaled: bool,
    to_end: bool,
) -> bool:
    """As `_decode_crop`, by FFCV's decoder; always at full size and to the end."""
    height, width = np.int64(entry["height"]), np.int64(entry["width"])
    image = np.empty((height, width, 3), np.uint8)
    status = decode_whole(data, image, height, width, 1)
    if status == DAMAGED or (to_end and status == LEFTOVER):
        return False
    _resize_by_opencv(image, box, target, flip)
    return True


@numba.njit(nogil=True)
def _decode_crop(
    data: NDArray[np.uint8],
    entry: np.void,
    box: NDArray[np.int64],
    target: NDArray[np.uint8],
    flip: int,
    is_scaled: bool,
    to_end: bool,
) -> bool:
    """Decode a box (top, left, height, width) and resize it by area; whether it was clean."""
    height, width = np.int64(entry["height"]), np.int64(entry["width"])
    divisor = np.int64(8 if is_scaled else 1)
    while divisor > 1 and (
        box[2] < divisor * target.shape[0] or box[3] < divisor * target.shape[1]
    ):
        divisor //= 2
    status = _decode_reduced(
        data.ctypes.data,
        data.size,
        height,
        width,
        box.ctypes.data,
        divisor,
        to_end,
        target.ctypes.data,
        target.shape[0],
        target.shape[1],
        flip,
    )
    if status >= 0:
        return status == 0
    rows, columns = min(height, box[2]) // divisor, min(width, box[3]) // divisor
    pixels = np.empty((rows + MARGIN) * (columns + 2 * MARGIN) * 3, np.uint8)
    placed = np.empty(4, np.int64)
    failed = _decode_box(
        data.ctypes.data,
        data.size,
        height,
        width,
        box.ctypes.data,
        divisor,
        to_end,
        pixels.ctypes.data,
        pixels.size,
        placed.ctypes.data,
    )
    if failed:
        return False
    image = pixels[: placed[2] * placed[3] * 3].reshape((placed[2], placed[3], 3))
    top, left = box[0] // divisor - placed[0], box[1] // divisor - placed[1]
    right = min(-(-(box[1] + box[3]) // divisor) - placed[1], placed[3])
    inner = np.array((top, left, placed[2] - top, right - left), np.int64)
    _resize_by_opencv(image, inner, target, flip)
    return True


@numba.njit(nogil=True)
def _resize_by_opencv(
    image: NDArray[np.uint8], box: NDArray[np.int64], target: NDArray[np.uint8], flip: int
) -> None:
    """Resize a box of an image (H, W, 3) by area, and flip it where asked."""
    _resize_crop(image, box[0], box[0] + box[2], box[1], box[1] + box[3], target)
    if flip:
        _mirror(target)


@numba.njit(nogil=True)
def _resize_by_rows(
    image: NDArray[np.uint8], box: NDArray[np.int64], target: NDArray[np.uint8], flip: int
) -> None:
    """The same pixels, sooner, where a box becomes smaller."""
    to = (target.ctypes.data, target.shape[0], target.shape[1])
    if _reduce(image.ctypes.data, image.shape[1], box.ctypes.data, to[0], to[1], to[2], flip) < 0:
        _resize_by_opencv(image, box, target, flip)


_decode_jpeg = _decode_whole if WHY_WHOLE else _decode_crop
_resize_pixels = _resize_by_opencv if WHY_WHOLE else _resize_by_rows


@numba.njit(nogil=True)
def _mirror(image_HWC: NDArray[np.uint8]) -> None:
    """Swap left and right in place."""
    height, width, channels = image_HWC.shape
    for row in range(height):
        for left in range(width // 2):
            right = width - 1 - left
            for channel in range(channels):
                value = image_HWC[row, left, channel]
                image_HWC[row, left, channel] = image_HWC[row, right, channel]
                image_HWC[row, right, channel] = value
