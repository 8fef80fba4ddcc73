"""What is to be shown of each image: a crop box, and whether to flip it."""

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.rng import Draws, Keys

VIEW = np.dtype(
    [
        ("sample", "<i8"),
        ("top", "<i4"),
        ("left", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("flip", "<i4"),
    ],
    align=True,
)
"""One image to decode: its index, its crop box in pixels, and 1 where it is to be flipped."""

Views = NDArray[np.void]

CROP_ATTEMPTS = 10  # as torchvision and timm do, before they fall back to a centre crop


def random_views(
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    keys: Keys,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
) -> Views:
    """Random resized crop and horizontal flip of each sample; all arrays are (N,).

    The crop has a share of the area uniform in `scale` and an aspect ratio (width over height)
    log-uniform in `ratio`. Where ten draws fit no box into the image, it is the largest centred
    box with an aspect ratio in `ratio`.
    """
    draws = Draws(keys, "view")
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    views = np.zeros(len(samples), VIEW)
    views["sample"] = samples
    views["flip"] = draws.uniform(0) < hflip
    low, high = np.log(ratio)
    open_rows = np.arange(len(samples))
    for attempt in range(CROP_ATTEMPTS):
        area, shape, top, left = (
            draws.uniform(1 + 4 * attempt + number, open_rows) for number in range(4)
        )
        image_height, image_width = heights[open_rows], widths[open_rows]
        area = image_height * image_width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = np.exp(low + shape * (high - low))
        width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
        rows = open_rows[fits]
        views["top"][rows] = (top * (image_height - height + 1))[fits]
        views["left"][rows] = (left * (image_width - width + 1))[fits]
        views["height"][rows] = height[fits]
        views["width"][rows] = width[fits]
        open_rows = open_rows[~fits]
    aspect = np.clip(widths[open_rows] / heights[open_rows], *ratio)
    _centre(views, open_rows, heights, widths, aspect, share=1.0)
    return views


def centre_views(
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    *,
    aspect: float,
    share: float,
) -> Views:
    """The largest centred box of this aspect ratio (width over height), its sides times `share`."""
    views = np.zeros(len(samples), VIEW)
    views["sample"] = samples
    rows = np.arange(len(samples))
    _centre(views, rows, heights.astype(np.int64), widths.astype(np.int64), aspect, share)
    return views


def _centre(
    views: Views,
    rows: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    aspect: float | NDArray[np.float64],
    share: float,
) -> None:
    """Write the largest centred boxes of these aspect ratios, their sides times `share`."""
    image_height, image_width = heights[rows], widths[rows]
    height = np.minimum(image_height, image_width / aspect)
    views["height"][rows] = np.maximum(1, np.rint(share * height))
    views["width"][rows] = np.maximum(1, np.rint(share * height * aspect))
    views["top"][rows] = (image_height - views["height"][rows]) // 2
    views["left"][rows] = (image_width - views["width"][rows]) // 2
