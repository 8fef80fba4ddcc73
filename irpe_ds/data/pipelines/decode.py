"""Decoding a batch of views with FFCV's native decoder, in parallel and without Python's lock."""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from irpe_ds.data.beton.format import JPG, imdecode, resize_crop
from irpe_ds.data.crops import Views

_imdecode = njit(nogil=True)(imdecode)
_resize_crop = njit(nogil=True)(resize_crop)


@njit(nogil=True, parallel=True)
def decode_views(
    file: NDArray[np.uint8],
    entries: NDArray[np.void],
    views: Views,
    images_BHWC: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Decode each view's image, crop its box, resize it by area and flip it where it says so.

    Compiled at the first call, which takes seconds; once per process.

    Args:
        file: the .beton file, (bytes,).
        entries: ENTRY of every sample in it (irpe_ds.data.beton.reader).
        views: VIEW of the images to decode, (B,); boxes lie within their images.
        images_BHWC: receives the pixels.

    Returns:
        (B,) whether each image decoded cleanly; where not, its pixels are anything.
    """
    intact = np.zeros(len(views), np.bool_)
    for position in prange(len(views)):
        view = views[position]
        entry = entries[view["sample"]]
        data = file[entry["start"] : entry["start"] + entry["bytes"]]
        height, width = np.int64(entry["height"]), np.int64(entry["width"])
        image = np.empty((height, width, 3), np.uint8)
        if entry["mode"] == JPG:
            status = _imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
            intact[position] = status == 0
        elif data.size == image.size:
            image.reshape(-1)[:] = data
            intact[position] = True
        bottom, right = view["top"] + view["height"], view["left"] + view["width"]
        target = images_BHWC[position]
        _resize_crop(image, view["top"], bottom, view["left"], right, target)
        if view["flip"]:
            _mirror(target)
    return intact


@njit(nogil=True)
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
