"""From stored images to a batch of crops, in numba's threads; compiled at the first call."""

import numba
import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.beton.format import JPG, resize_crop
from irpe_ds.data.beton.jpeg import DAMAGED, LEFTOVER
from irpe_ds.data.beton.jpeg import decode as decode_whole
from irpe_ds.data.crops import Crops
from irpe_ds.data.pipelines import jpeg
from irpe_ds.errors import UserError

MARGIN = 64
"""Pixels at most that `decode_box` adds on a side of a box: two of a JPEG's largest units."""

WHY_WHOLE: str | None = None
"""Why whole images are decoded, by FFCV's decoder, instead of crops; None where crops are."""
try:
    _decode_box, _decode_reduced, _reduce = jpeg.load()
except UserError as error:
    WHY_WHOLE = str(error)
_resize_crop = numba.njit(nogil=True)(resize_crop)


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
