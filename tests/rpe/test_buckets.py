"""Bucket ids: those of the released implementation, and the properties that they must have."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from irpe_ds.errors import ConfigError
from irpe_ds.rpe.buckets import BUCKET_METHODS, BucketMap, piecewise_index

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "bucket_ids.npz")
GOLDEN_MAPS = [key.removesuffix("|ids") for key in GOLDEN if key.endswith("|ids")]
PAPER = {"alpha": 1.9, "beta": 3.8, "gamma": 15.2}


@pytest.mark.parametrize("key", GOLDEN_MAPS)
def test_the_released_ids(key: str) -> None:
    method, ratio, grid, skip = key.split("|")
    height, width = map(int, grid.split("x"))
    skip_tokens = int(skip.removeprefix("skip="))
    buckets = BucketMap.build(
        method, height, width, skip_tokens, ratio=float(ratio.removeprefix("ratio="))
    )
    assert buckets.num_buckets == GOLDEN[f"{key}|num_buckets"]
    assert buckets.ids.dtype == torch.int32
    np.testing.assert_array_equal(buckets.ids.numpy(), GOLDEN[f"{key}|ids"])


class TestPiecewiseIndex:
    def test_is_odd(self) -> None:
        x = torch.arange(-40.0, 40.0, 0.25)
        torch.testing.assert_close(piecewise_index(-x, **PAPER), -piecewise_index(x, **PAPER))

    def test_never_falls_as_the_offset_grows(self) -> None:
        index = piecewise_index(torch.arange(-300, 301), **PAPER)
        assert (index.diff() >= 0).all()

    def test_clips_at_beta_and_truncates_it(self) -> None:
        index = piecewise_index(torch.tensor([10, 1000, -1000]), **PAPER)
        assert index.tolist() == [3, 3, -3]  # int(3.8), not round(3.8)

    @pytest.mark.parametrize(
        ("offset", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (-0.5, 0), (-2.5, -2)]
    )
    def test_rounds_half_to_even_near_zero(self, offset: float, expected: int) -> None:
        index = piecewise_index(torch.tensor(offset), alpha=20, beta=40, gamma=160)
        assert index.item() == expected

    def test_rounds_half_to_even_far_from_zero(self) -> None:
        # alpha + ln(x / alpha) / ln(gamma / alpha) (beta - alpha) = 1 + log2(x) / 2
        index = piecewise_index(torch.tensor([2.0, 8.0, 32.0]), alpha=1, beta=4, gamma=64)
        assert index.tolist() == [2, 2, 4]  # of 1.5, 2.5 and 3.5


@pytest.mark.parametrize("method", BUCKET_METHODS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (3, 8), (6, 6)])
@pytest.mark.parametrize("skip", [0, 1, 2, 5])
@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.9, 20.0])
def test_every_grid(method: str, grid: tuple[int, int], skip: int, ratio: float) -> None:
    buckets = BucketMap.build(method, *grid, skip, ratio)
    ids, length = buckets.ids, skip + grid[0] * grid[1]
    assert ids.shape == (length, length)
    assert ids.min() >= 0
    assert ids.max() < buckets.num_buckets
    assert (buckets.grid, buckets.skip) == (grid, skip)

    patches = BucketMap.build(method, *grid, 0, ratio)
    assert torch.equal(ids[skip:, skip:], patches.ids)
    if skip:
        assert buckets.num_buckets == patches.num_buckets + 1
        is_patch = torch.arange(length) >= skip
        of_skip = ids[~(is_patch[:, None] & is_patch)]
        assert (of_skip == buckets.num_buckets - 1).all()


@pytest.mark.parametrize("method", BUCKET_METHODS)
def test_a_bucket_belongs_to_an_offset(method: str) -> None:
    """Pairs of patches with one offset share their bucket, wherever on the grid they lie."""
    height, width = 4, 6
    ids = BucketMap.build(method, height, width).ids.view(height, width, height, width)
    assert torch.equal(ids[1:, 1:, 1:, 1:], ids[:-1, :-1, :-1, :-1])


def test_rows_and_columns_are_not_swapped() -> None:
    rows = BucketMap.build("cross_rows", 2, 3, ratio=2).ids
    cols = BucketMap.build("cross_cols", 2, 3, ratio=2).ids
    assert rows[0].tolist() == [4, 4, 4, 3, 3, 3]  # the first patch against both rows
    assert cols[0].tolist() == [4, 3, 2, 4, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("cross", 4, 4), "method"),
        (("produkt", 4, 4), "method"),
        (("product", 0, 4), "grid"),
        (("product", 4, -1), "grid"),
        (("product", 4, 4, -1), "grid"),
        (("product", 128, 128, 1), "grid"),
    ],
)
def test_errors(arguments: tuple, where: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{where}: expected .*, got .*") as caught:
        BucketMap.build(*arguments)
    assert str(arguments[0 if where == "method" else 2]) in str(caught.value)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_without_meaning(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"^ratio: expected .*, got "):
        BucketMap.build("product", 4, 4, ratio=ratio)


class TestModule:
    def test_adds_no_key_to_the_state_dict(self) -> None:
        buckets = BucketMap.build("product", 3, 3)
        assert list(buckets.state_dict()) == []
        assert list(buckets.parameters()) == []

    def test_follows_its_model_but_keeps_integers(self) -> None:
        model = nn.Sequential(BucketMap.build("product", 3, 3)).to("meta", torch.float16)
        assert model[0].ids.device.type == "meta"
        assert model[0].ids.dtype == torch.int32

    def test_is_built_on_the_cpu_whatever_the_default_device(self) -> None:
        with torch.device("meta"):
            buckets = BucketMap.build("product", 3, 3, 1)
        assert torch.equal(buckets.ids, BucketMap.build("product", 3, 3, 1).ids)

    def test_stays_shared_in_a_copy(self) -> None:
        buckets = BucketMap.build("product", 3, 3)
        first, second = copy.deepcopy(nn.ModuleList([nn.Sequential(buckets) for _ in range(2)]))
        assert first[0] is second[0]
        assert first[0] is not buckets

    def test_describes_itself(self) -> None:
        assert "product, 3x4, skip=1, buckets=50" in repr(BucketMap.build("product", 3, 4, 1))
