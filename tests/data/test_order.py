"""Which rank sees which image, in training and validation."""

import numpy as np
import pytest

from irpe_ds.data.order import BLOCK, block_order, eval_order, split, train_order

LAYOUTS = [(1, 1, 8), (2, 1, 4), (4, 1, 2), (1, 2, 4), (2, 2, 2), (4, 2, 1)]
WINDOWS = [None, 1, 2 * BLOCK, 1000]  # all, one block, two of the three, more than there are


def updates(
    world_size: int,
    accumulation: int,
    batch_size: int,
    epoch: int = 0,
    window: int | None = None,
    repeats: int = 1,
) -> np.ndarray:
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
            window=window,
            repeats=repeats,
        ).samples.reshape(-1, accumulation * batch_size)
        for rank in range(world_size)
    ]
    return np.concatenate(ranks, axis=1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), LAYOUTS)
def test_images_of_an_update_do_not_depend_on_the_layout(
    world_size: int, accumulation: int, batch_size: int, window: int | None
) -> None:
    found = updates(world_size, accumulation, batch_size, window=window)
    assert found.shape == (4, 8)
    assert len(np.unique(found)) == 32  # each at most once
    assert np.array_equal(np.sort(found), np.sort(updates(1, 1, 8, window=window)))
    repeated = updates(world_size, accumulation, batch_size, window=window, repeats=3)
    expected = np.repeat(updates(1, 1, 8, window=window), 3)[:32].reshape(4, 8)
    assert np.array_equal(np.sort(repeated), np.sort(expected))


@pytest.mark.parametrize("window", WINDOWS)
def test_epochs_and_seeds_differ(window: int | None) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        layout = {"batch_size": 1, "accumulation": 1, "rank": 0, "world_size": 1}
        found = train_order(37, **layout, seed=seed, epoch=epoch, window=window).samples
        assert sorted(found) == [*range(37)]
        return found.tolist()

    assert order(3, 0) == order(3, 0)
    assert len({tuple(order(*key)) for key in ((3, 0), (3, 1), (4, 0))}) == 3


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
        samples, numbers, _ = train_order(
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


@pytest.mark.parametrize("window", [None, 32])
def test_repetitions_of_an_image_are_told_apart(window: int | None) -> None:
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
            window=window,
        )[:2]
        for rank in range(2)
    ]
    pairs = np.concatenate(ranks, axis=1)
    assert pairs.shape == (2, 100)
    assert len(np.unique(pairs, axis=1).T) == 100


class TestBlocks:
    """Of 20,000 images in 200 classes, one after the other; a window of 1,024."""

    LABELS = np.arange(20_000) // 100
    ORDER = block_order(20_000, 1024, np.random.default_rng(0))[0]

    def classes(self, order: np.ndarray, batch: int) -> float:
        """Mean number of classes in a batch."""
        rows = self.LABELS[order[: len(order) // batch * batch]].reshape(-1, batch)
        return float(np.mean([len(np.unique(row)) for row in rows]))

    def test_a_batch_of_the_window_over_16_is_as_mixed_as_one_of_a_permutation(self) -> None:
        permutation = np.random.default_rng(0).permutation(20_000)
        for batch in (16, 64):
            mixed = self.classes(self.ORDER, batch) / self.classes(permutation, batch)
            assert 0.96 < mixed < 1.02
        assert self.classes(self.ORDER, 512) < 0.7 * self.classes(permutation, 512)

    def test_a_block_is_shown_within_a_window(self) -> None:
        places = np.empty(20_000, int)
        places[self.ORDER] = np.arange(20_000)
        span = np.ptp(places.reshape(-1, BLOCK), axis=1)
        assert 0.9 * 1024 < np.median(span) < span.max() < 1.1 * 1024

    @pytest.mark.parametrize("world_size", [1, 4])
    def test_a_rank_reads_mostly_whole_blocks(self, world_size: int) -> None:
        layout = {"batch_size": 64 // world_size, "accumulation": 1, "world_size": world_size}
        for rank in range(world_size):
            own = train_order(20_000, **layout, rank=rank, seed=0, epoch=0, window=1024)
            images = np.unique(own.blocks, return_counts=True)[1]
            assert (own.samples // BLOCK == own.blocks).all()
            assert np.average(images, weights=images) > (15.9 if world_size == 1 else 13)


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
