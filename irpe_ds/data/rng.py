"""A counter-based random number generator for each sample of an epoch.

Numbers are drawn on the host, for a batch or an epoch at once, from a key of each sample's own:
they are the same for every number of threads, workers, ranks and restarts.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Index = NDArray[np.int64] | slice

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STREAM = 1  # keeps these streams apart from the permutation's, also seeded by (seed, epoch)
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
        repeats: number of each image's repetition within the epoch, (N,).
    """
    key = np.random.SeedSequence([seed, epoch, _STREAM]).generate_state(1, np.uint64)
    keys = _mix(_mix(samples.astype(np.uint64) + np.uint64(1)) + key)
    return _mix(keys + np.asarray(repeats, np.uint64) * _GOLDEN)


class PerSampleRNG:
    """Independent streams of random numbers, one per key, for one purpose.

    SplitMix64 (Steele et al., OOPSLA 2014) as a counter-based generator: each number is a function
    of its key, the purpose and its position in the stream.
    """

    def __init__(self, keys: Keys, purpose: str) -> None:
        name = np.array([zlib.crc32(purpose.encode())], np.uint64)
        self._states = _mix(keys ^ _mix(name))

    def uniform(self, position: int, index: Index = _ALL) -> NDArray[np.float64]:
        """The uniform in [0, 1) at this position of the streams that `index` selects."""
        return (self._bits(position, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, position: int, index: Index = _ALL) -> NDArray[np.float64]:
        """A standard normal (Box and Muller) from the uniforms at `position` and the next."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(position, index)))
        return radius * np.cos(2 * np.pi * self.uniform(position + 1, index))

    def _bits(self, position: int, index: Index) -> NDArray[np.uint64]:
        step = np.array([position + 1], np.uint64) * _GOLDEN
        return _mix(self._states[index] + step)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits that scatters neighbours."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
