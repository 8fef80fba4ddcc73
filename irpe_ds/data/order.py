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
) -> Samples:
    """The samples of one rank in one training epoch, (passes * batch_size,), without remainder.

    One permutation, a function of (seed, epoch) alone, is cut into updates first and only then
    among micro-steps and ranks: the images of an update are the same set for every number of
    ranks and every accumulation with the same product.
    """
    permutation = np.random.default_rng([seed, epoch]).permutation(num_samples)
    updates = num_samples // (batch_size * accumulation * world_size)
    used = permutation[: updates * accumulation * world_size * batch_size]
    return used.reshape(updates * accumulation, world_size, batch_size)[:, rank].ravel()


def eval_order(
    num_samples: int, *, batch_size: int, rank: int, world_size: int
) -> tuple[Samples, NDArray[np.bool_]]:
    """The samples of one rank in a validation pass, and which of them count, each (B * batches,).

    Every rank has the same number of batches, all full; what is missing is filled with
    repetitions of the last sample that do not count.
    """
    batches = -(-num_samples // (batch_size * world_size))
    positions = np.arange(batches * world_size * batch_size)
    mine = positions.reshape(batches, world_size, batch_size)[:, rank].ravel()
    return np.minimum(mine, num_samples - 1), mine < num_samples
