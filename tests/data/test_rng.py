"""Random numbers per sample."""

import numpy as np
import pytest

from irpe_ds.data.rng import PerSampleRNG, image_keys

COUNT = 40000
SAMPLES = np.arange(COUNT)


def keys(**options: int) -> np.ndarray:
    return image_keys(SAMPLES, **{"seed": 0, "epoch": 0} | options)


def assert_unrelated(a: np.ndarray, b: np.ndarray) -> None:
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


def test_keys_are_a_function_of_seed_epoch_sample_and_repeat() -> None:
    some = np.array([7, 39999, 7, 0])
    assert np.array_equal(image_keys(some, seed=0, epoch=0), keys()[some])
    assert len(np.unique(keys())) == COUNT
    others = [keys(seed=1), keys(epoch=1), keys(repeats=1), keys(seed=1, epoch=1)]
    every = np.concatenate([keys(), *others])
    assert len(np.unique(every)) == len(every)


def test_repeats_may_differ_within_a_batch() -> None:
    repeats = SAMPLES % 3
    mixed = image_keys(SAMPLES, seed=0, epoch=0, repeats=repeats)
    for repeat in range(3):
        assert np.array_equal(mixed[repeats == repeat], keys(repeats=repeat)[repeats == repeat])


@pytest.mark.parametrize("number", [0, 1, 2, 50])
def test_uniforms_are_uniform(number: int) -> None:
    values = PerSampleRNG(keys(), "test").uniform(number)
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, 50, (0, 1))[0]
    chi_square = ((counts - COUNT / 50) ** 2 / (COUNT / 50)).sum()
    assert 20 < chi_square < 100  # 49 +- 10
    assert_unrelated(values[1:], values[:-1])


def test_normals_are_normal() -> None:
    values = PerSampleRNG(keys(), "test").normal(3)
    assert values.mean() == pytest.approx(0, abs=5 / np.sqrt(COUNT))
    assert values.std() == pytest.approx(1, abs=5 / np.sqrt(2 * COUNT))
    for bound, share in ((0.5, 0.6171), (1, 0.3173), (2, 0.0455), (3, 0.0027)):
        error = 5 * np.sqrt(share * (1 - share) / COUNT)
        assert np.mean(np.abs(values) > bound) == pytest.approx(share, abs=error)
    assert_unrelated(values[1:], values[:-1])


def test_numbers_purposes_seeds_and_epochs_are_independent() -> None:
    one = PerSampleRNG(keys(), "test").uniform(0)
    assert_unrelated(one, PerSampleRNG(keys(), "test").uniform(1))
    assert_unrelated(one, PerSampleRNG(keys(), "other").uniform(0))
    assert_unrelated(one, PerSampleRNG(keys(), "other").uniform(1))
    for other in ({"seed": 1}, {"epoch": 1}, {"repeats": 1}):
        assert_unrelated(one, PerSampleRNG(keys(**other), "test").uniform(0))


def test_index_selects_streams() -> None:
    rng = PerSampleRNG(keys(), "test")
    index = np.array([5, 3, 5, 39999])
    assert np.array_equal(rng.uniform(2, index), rng.uniform(2)[index])
    assert np.array_equal(rng.normal(2, index), rng.normal(2)[index])
    assert np.array_equal(rng.uniform(2, slice(4, 9)), rng.uniform(2)[4:9])
    assert rng.uniform(2, np.empty(0, np.int64)).shape == (0,)
