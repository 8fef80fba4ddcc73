"""Which rank sees which image, in training and validation."""

import numpy as np
import pytest

from irpe_ds.data.order import eval_order, split, train_order

LAYOUTS = [(1, 1, 8), (2, 1, 4), (4, 1, 2), (1, 2, 4), (2, 2, 2), (4, 2, 1)]


def updates(world_size: int, accumulation: int, batch_size: int, epoch: int = 0) -> np.ndarray:
    """The 8 images of each update, (updates, 8), of 37 images."""
    ranks = [
        train_order(
            37,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            seed=3,
            epoch=epoch,
        )[0].reshape(-1, accumulation * batch_size)
        for rank in range(world_size)
    ]
    return np.concatenate(ranks, axis=1)


@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), LAYOUTS)
def test_images_of_an_update_do_not_depend_on_the_layout(
    world_size: int, accumulation: int, batch_size: int
) -> None:
    found = updates(world_size, accumulation, batch_size)
    assert found.shape == (4, 8)
    assert len(np.unique(found)) == 32  # each at most once
    assert np.array_equal(np.sort(found), np.sort(updates(1, 1, 8)))


def test_epochs_and_seeds_differ() -> None:
    assert np.array_equal(updates(1, 1, 8), updates(1, 1, 8))
    assert not np.array_equal(updates(1, 1, 8, epoch=0), updates(1, 1, 8, epoch=1))
    orders = [
        train_order(37, batch_size=1, accumulation=1, rank=0, world_size=1, seed=s, epoch=0)
        for s in (0, 1)
    ]
    assert not np.array_equal(*orders)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 3, 24, 37])
def test_validation_counts_every_image_once(world_size: int, num_samples: int) -> None:
    counted, lengths = [], set()
    for rank in range(world_size):
        samples, valid = eval_order(num_samples, batch_size=4, rank=rank, world_size=world_size)
        assert samples.max() < num_samples
        counted += samples[valid].tolist()
        lengths.add(len(samples))
    assert sorted(counted) == list(range(num_samples))
    assert len(lengths) == 1  # the same number of batches on every rank
    assert lengths.pop() % 4 == 0  # all of them full


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("global_batch", [256, 1024])
def test_repeats_are_those_of_deits_sampler(world_size: int, global_batch: int) -> None:
    num_samples, repeats, batch_size = 5000, 3, global_batch // world_size
    permutation = np.random.default_rng([3, 0]).permutation(num_samples)
    repeated = np.repeat(permutation, repeats)  # as its RASampler: every image three times,
    kept = num_samples // 256 * 256 // world_size  # dealt out to the ranks, so many each,
    for rank in range(world_size):
        theirs = repeated[rank::world_size][:kept]
        theirs = theirs[: len(theirs) // batch_size * batch_size]  # in whole batches
        samples, numbers = train_order(
            num_samples,
            batch_size=batch_size,
            accumulation=1,
            rank=rank,
            world_size=world_size,
            seed=3,
            epoch=0,
            repeats=repeats,
        )
        assert np.array_equal(samples, theirs)
        assert set(numbers.tolist()) == {0, 1, 2}


def test_repetitions_of_an_image_are_told_apart() -> None:
    ranks = [
        train_order(
            100,
            batch_size=5,
            accumulation=1,
            rank=rank,
            world_size=2,
            seed=0,
            epoch=0,
            repeats=3,
        )
        for rank in range(2)
    ]
    pairs = np.concatenate(ranks, axis=1)
    assert pairs.shape == (2, 100)
    assert len(np.unique(pairs, axis=1).T) == 100


class TestSplit:
    LABELS = np.repeat([0, 1, 2, 3], [10, 3, 2, 1])

    @pytest.mark.parametrize(("share", "taken"), [(0.2, [2, 1, 1, 0]), (0.9, [9, 2, 1, 0])])
    def test_both_parts_have_each_class_with_two_images(
        self, share: float, taken: list[int]
    ) -> None:
        train, val = split(self.LABELS, share, 0)
        assert np.array_equal(np.sort([*train, *val]), np.arange(16))
        assert np.bincount(self.LABELS[val], minlength=4).tolist() == taken
        assert [*train] == sorted(train)
        assert [*val] == sorted(val)

    def test_it_is_a_function_of_the_seed(self) -> None:
        labels = np.zeros(100, np.int64)
        one, same, other = (split(labels, 0.2, seed)[1] for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
