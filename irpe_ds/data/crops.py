"""Crop box and flip of each image."""

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.rng import Keys, PerSampleRNG

CROP = np.dtype(
    [
        ("sample", "<i8"),
        ("top", "<i4"),
        ("left", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("flip", "<i4"),
        ("shift_down", "<i4"),
        ("shift_right", "<i4"),
    ],
    align=True,
)
"""One image to decode: its index, its crop box in pixels, 1 if it is to be flipped, and how far the
resized box is to be shifted over the image's border, which is mirrored."""

Crops = NDArray[np.void]

PADDING = 4  # of the simple crop, as in DeiT III
CROP_ATTEMPTS = 10  # as torchvision and timm, which then fall back to a centre crop


def random_resized_crops(
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    keys: Keys,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
) -> Crops:
    """Random resized crop and horizontal flip of each sample; all arrays are (N,).

    The box covers a share of the area uniform in `scale`, with an aspect ratio (width over height)
    log-uniform in `ratio`. If none of ten attempts fits into the image, the box is the largest
    centred one with an aspect ratio in `ratio`.
    """
    rng = PerSampleRNG(keys, "view")  # the name selects the stream: another changes every crop
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    crops = np.zeros(len(samples), CROP)
    crops["sample"] = samples
    crops["flip"] = rng.uniform(0) < hflip
    low, high = np.log(ratio)
    pending = np.arange(len(samples))
    for attempt in range(CROP_ATTEMPTS):
        area, shape, top, left = (rng.uniform(1 + 4 * attempt + n, pending) for n in range(4))
        image_height, image_width = heights[pending], widths[pending]
        area = image_height * image_width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = np.exp(low + shape * (high - low))
        width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
        found = pending[fits]
        crops["top"][found] = (top * (image_height - height + 1))[fits]
        crops["left"][found] = (left * (image_width - width + 1))[fits]
        crops["height"][found] = height[fits]
        crops["width"][found] = width[fits]
        pending = pending[~fits]
    aspect = np.clip(widths[pending] / heights[pending], *ratio)
    _centre(crops, pending, heights, widths, aspect, share=1.0)
    return crops


def simple_crops(
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    keys: Keys,
    *,
    size: tuple[int, int],
    hflip: float,
) -> Crops:
    """DeiT III's simple random crop and horizontal flip of each sample; all arrays are (N,).

    The image is scaled to cover `size`, and a box of that size is at a place uniform in it and 4
    mirrored pixels around it. What is mirrored is left to a shift of the resized box.
    """
    rng = PerSampleRNG(keys, "simple crop")
    crops = np.zeros(len(samples), CROP)
    crops["sample"] = samples
    crops["flip"] = rng.uniform(0) < hflip
    shrink = np.minimum(heights / size[0], widths / size[1])  # source pixels of one of the result
    names = ("height", "top", "shift_down"), ("width", "left", "shift_right")
    for axis, (side, first, shift) in enumerate(names):
        sides = (heights, widths)[axis]
        free = np.rint(sides / shrink).astype(np.int64) - size[axis]
        place = (rng.uniform(1 + axis) * (free + 2 * PADDING + 1)).astype(np.int64) - PADDING
        inside = np.clip(place, 0, free)
        crops[shift] = place - inside
        crops[side] = np.clip(np.rint(size[axis] * shrink), 1, sides)
        crops[first] = np.minimum(np.rint(inside * shrink), sides - crops[side])
    return crops


def center_crops(
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    *,
    aspect: float,
    share: float,
) -> Crops:
    """The largest centred box of this aspect ratio (width over height), its sides times `share`."""
    crops = np.zeros(len(samples), CROP)
    crops["sample"] = samples
    index = np.arange(len(samples))
    _centre(crops, index, heights.astype(np.int64), widths.astype(np.int64), aspect, share)
    return crops


def _centre(
    crops: Crops,
    index: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    aspect: float | NDArray[np.float64],
    share: float,
) -> None:
    """Write the largest centred boxes of these aspect ratios, their sides times `share`."""
    image_height, image_width = heights[index], widths[index]
    height = np.minimum(image_height, image_width / aspect)
    crops["height"][index] = np.maximum(1, np.rint(share * height))
    crops["width"][index] = np.maximum(1, np.rint(share * height * aspect))
    crops["top"][index] = (image_height - crops["height"][index]) // 2
    crops["left"][index] = (image_width - crops["width"][index]) // 2
