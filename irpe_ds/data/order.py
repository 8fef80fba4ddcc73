"""Which images an epoch shows, in which order, and which rank gets which of them."""

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]


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
) -> Samples:
    """The samples of one rank in one training epoch, and the number of each one's repetition.

    One permutation, a function of (seed, epoch) alone, is cut into updates first and only then
    among micro-steps and ranks: the images of an update are the same set for every number of
    ranks and every accumulation with the same product.

    Repeated augmentation (Hoffer et al., CVPR 2020) shows an image `repeats` times in a row,
    neighbours on different ranks, and correspondingly fewer images: the length of an epoch does
    not change. If 256 divides the global batch, these are the images that DeiT's sampler takes.

    Returns:
        (2, passes * batch_size): samples and repetitions, full batches only.
    """
    permutation = np.random.default_rng([seed, epoch]).permutation(num_samples)
    updates = num_samples // (batch_size * accumulation * world_size)
    mine = np.arange(rank, updates * accumulation * batch_size * world_size, world_size)
    return np.stack([permutation[mine // repeats], mine % repeats])


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
