"""Which images an epoch shows, in which order, and which rank gets which of them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]


BLOCK = 16
"""Images of a block. Of ImageNet's 110 KB they are 1.8 MB: large enough a request for disks of
flash and for networks, and a window of 1,024 blocks needs 1.8 GB."""


class TrainOrder(NamedTuple):
    """What one rank shows in one training epoch, (passes * batch_size,) each; full batches only."""

    samples: Samples
    repetitions: NDArray[np.int64]
    """The number of each one's repetition."""
    blocks: NDArray[np.int64]
    """Samples of the same block are neighbours in the file, and are read together."""


def train_order(
    num_samples: int,
    *,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    repeats: int = 1,
    window: int | None = None,
) -> TrainOrder:
    """The samples of one rank in one training epoch.

    One order of all samples, a function of (seed, epoch) alone, is cut into updates first and only
    then among micro-steps and ranks: the images of an update are the same set for every number of
    ranks and every accumulation with the same product.

    Repeated augmentation (Hoffer et al., CVPR 2020) shows an image `repeats` times in a row and
    correspondingly fewer images: the length of an epoch does not change. Without a window,
    neighbours are on different ranks; if 256 divides the global batch, these are the images that
    DeiT's sampler takes.

    Args:
        window: images that `block_order` mixes. None: the order is a permutation of all.
    """
    rng = np.random.default_rng([seed, epoch])
    share = batch_size * accumulation
    updates = num_samples // (share * world_size)
    if window is None:
        permutation = rng.permutation(num_samples)
        mine = np.arange(rank, updates * share * world_size, world_size)
        samples = permutation[mine // repeats]
        return TrainOrder(samples, mine % repeats, samples)
    order, streams = block_order(num_samples, window, rng)
    positions = np.arange(updates * share * world_size).reshape(updates, -1)
    # A rank gets neighbouring streams of every update, and so, mostly, whole blocks.
    by_stream = streams[order[positions // repeats] // BLOCK].argsort(axis=1, kind="stable")
    kept = np.sort(by_stream[:, rank * share : (rank + 1) * share], axis=1)
    mine = np.take_along_axis(positions, kept, axis=1).ravel()
    samples = order[mine // repeats]
    return TrainOrder(samples, mine % repeats, samples // BLOCK)


def block_order(
    num_samples: int, window: int, rng: np.random.Generator
) -> tuple[Samples, NDArray[np.int64]]:
    """An order of all samples in which those of a block, neighbours in the file, are not far apart.

    The blocks are permuted, and each one's images, in random order, spread evenly over `window`
    images: this is the mean of window / BLOCK blocks, each of which shows one image in turn. Of a
    file sorted by class, window / BLOCK images in a row are therefore of as many classes as
    in a permutation of all. More of them are of fewer: of ImageNet-1K and the default of 16,384,
    an update of 256 images has 224 classes (226 in a permutation of all), one of 1,024 has 644
    (642), one of 4,096 has 709 (983). In half a window at either end of an epoch half as many
    blocks are mixed: the first update of 1,024 has 446. Updates within a window share their
    blocks, and so their classes.

    Returns:
        The samples, (num_samples,), and a number of each block: blocks of the same number follow
        one another, those of different numbers are shown at the same time.
    """
    count = -(-num_samples // BLOCK)
    mixed = min(max(1, window // BLOCK), count)
    place = rng.permutation(count)
    begin = np.clip(place - mixed / 2, 0, count - mixed)
    turns = rng.permuted(np.tile(np.arange(BLOCK), (count, 1)), axis=1)
    # In units of blocks; the last term permutes those that would be shown at the same time.
    times = (begin[:, None] + turns * (mixed / BLOCK)).ravel()[:num_samples] + rng.random(
        num_samples
    )
    return times.argsort(kind="stable"), place % mixed


def split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[Samples, Samples]:
    """Samples for training and for validation, each in ascending order.

    Validation gets this share of every class, rounded, and both parts get an image of every class
    that has two; a function of labels, share and seed.
    """
    chosen = np.zeros(len(labels), np.bool_)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def eval_order(
    num_samples: int, *, batch_size: int, rank: int, world_size: int
) -> tuple[Samples, NDArray[np.bool_]]:
    """The samples of one rank in a validation pass, and which of them count, each (B * batches,).

    Every rank has the same number of batches, all full; repetitions of the last sample, which do
    not count, fill them up.
    """
    batches = -(-num_samples // (batch_size * world_size))
    positions = np.arange(batches * world_size * batch_size)
    mine = positions.reshape(batches, world_size, batch_size)[:, rank].ravel()
    return np.minimum(mine, num_samples - 1), mine < num_samples
