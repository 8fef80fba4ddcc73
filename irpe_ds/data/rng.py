"""Random numbers that belong to an image of an epoch.

They are drawn on the host, a batch or an epoch at once, from a key of the image's own: whatever
the number of threads, ranks or restarts, an image of an epoch gets the same numbers.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64] | slice

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STREAM = 1  # keeps these streams apart from the permutation's, which has (seed, epoch) too
_ALL = slice(None)


def image_keys(
    samples: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    repeats: NDArray[np.int64] | int = 0,
) -> Keys:
    """One key per image, (N,): a function of (seed, epoch, sample, repeat) alone.

    Args:
        samples: indices of the images, (N,).
        repeats: which repetition of its image within the epoch each is, (N,).
    """
    key = np.random.SeedSequence([seed, epoch, _STREAM]).generate_state(1, np.uint64)
    keys = _mix(_mix(samples.astype(np.uint64) + np.uint64(1)) + key)
    return _mix(keys + np.asarray(repeats, np.uint64) * _GOLDEN)


class Draws:
    """Independent streams of numbers, one per key, for one purpose.

    SplitMix64 (Steele et al., OOPSLA 2014): number n of a stream does not depend on the others.
    """

    def __init__(self, keys: Keys, purpose: str) -> None:
        name = np.array([zlib.crc32(purpose.encode())], np.uint64)
        self._states = _mix(keys ^ _mix(name))

    def uniform(self, number: int, rows: Rows = _ALL) -> NDArray[np.float64]:
        """The number-th uniform in [0, 1) of these rows' streams."""
        return (self._bits(number, rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, number: int, rows: Rows = _ALL) -> NDArray[np.float64]:
        """A standard normal by Box and Muller's method, of the uniforms number and number + 1."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(number, rows)))
        return radius * np.cos(2 * np.pi * self.uniform(number + 1, rows))

    def _bits(self, number: int, rows: Rows) -> NDArray[np.uint64]:
        step = np.array([number + 1], np.uint64) * _GOLDEN
        return _mix(self._states[rows] + step)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits that scatters neighbours."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
