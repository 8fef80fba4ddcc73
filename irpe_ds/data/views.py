"""What is to be shown of each image: a crop box, and whether to flip it.

Views are drawn here in NumPy, a whole epoch at once, and not in the decoder: so they are a
function of (seed, epoch, sample) whatever the number of threads, ranks or restarts.
"""

import numpy as np
from numpy.typing import NDArray

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
_STREAM = 1  # keeps these streams apart from the permutation's, which has (seed, epoch) too
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_views(
    samples: NDArray[np.int64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    seed: int,
    epoch: int,
) -> Views:
    """Random resized crop and horizontal flip of each sample; all arrays are (N,).

    The crop has a share of the area uniform in `scale` and an aspect ratio (width over height)
    log-uniform in `ratio`. Where ten draws fit no box into the image, it is the largest centred
    box with an aspect ratio in `ratio`.
    """
    streams = _Streams(samples, seed, epoch)
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    views = np.zeros(len(samples), VIEW)
    views["sample"] = samples
    views["flip"] = streams.draw(0, np.arange(len(samples))) < hflip
    low, high = np.log(ratio)
    open_rows = np.arange(len(samples))
    for attempt in range(CROP_ATTEMPTS):
        area, shape, top, left = (
            streams.draw(1 + 4 * attempt + number, open_rows) for number in range(4)
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


class _Streams:
    """One stream of uniform numbers per sample, by SplitMix64 (Steele et al., OOPSLA 2014)."""

    def __init__(self, samples: NDArray[np.int64], seed: int, epoch: int) -> None:
        key = np.random.SeedSequence([seed, epoch, _STREAM]).generate_state(1, np.uint64)
        self._states = _mix(_mix(samples.astype(np.uint64) + np.uint64(1)) + key)

    def draw(self, number: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The number-th uniform in [0, 1) of the streams of these rows."""
        step = np.array([number + 1], np.uint64) * _GOLDEN
        bits = _mix(self._states[rows] + step) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits that scatters neighbours."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
