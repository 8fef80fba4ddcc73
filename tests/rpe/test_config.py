"""RPEConfig: a typo is an error that names its field, never a model without encoding."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from irpe_ds.errors import ConfigError
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, count_buckets


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "cross_rows"),
        ("method", "Product"),
        ("mode", "ctx"),
        ("on", ""),
        ("on", "x"),
        ("on", "kx"),
        ("on", "kk"),
        ("on", "K"),
        ("ratio", 0.5),
        ("ratio", -1.9),
        ("ratio", float("nan")),
    ],
)
def test_errors_name_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        RPEConfig(**{field: value})
    error = caught.value
    assert error.where == field
    assert str(error) == f"{field}: expected {error.expected}, got {value!r}"


@pytest.mark.parametrize("on", ["v", "qv", "qkv"])
def test_values_have_no_bias_mode(on: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^on: expected a subset of 'qk' in bias mode, got '{on}"
    ):
        RPEConfig(mode="bias", on=on)


@pytest.mark.parametrize("on", ["q", "k", "v", "qk", "qv", "kv", "qkv", "vkq"])
def test_every_subset(on: str) -> None:
    assert RPEConfig(on=on).on == on


def test_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(FrozenInstanceError):
        RPEConfig().on = "q"  # type: ignore[misc]
    with pytest.raises(TypeError):
        RPEConfig("product")  # type: ignore[misc]


def test_the_default_is_the_paper_s_choice() -> None:
    rpe = RPEConfig()
    expected = ("product", "contextual", "k", 1.9, True)
    assert rpe.last_block
    assert (rpe.method, rpe.mode, rpe.on, rpe.ratio, rpe.shared_heads) == expected


@pytest.mark.parametrize(
    ("method", "ratio", "most", "used"),
    [
        ("product", 1.9, 49, "50 of 50"),
        ("euclidean", 20, 41, "20 of 82"),
        ("quantization", 33, 67, "51 of 134"),
        ("cross", 20, 162, "56 of 164"),
    ],
)
def test_ratios_and_buckets_are_the_released_ones(
    method: str, ratio: float, most: int, used: str
) -> None:
    """deit_small_..._euc_20, quant_51 and cross_56 count the buckets in use on 14 x 14 patches."""
    rpe = RPEConfig(method=method)
    assert rpe == RPEConfig(method=method, ratio=ratio)
    assert repr(rpe).endswith(
        f"ratio={ratio}, shared_heads=True, last_block=True, buckets<={most})"
    )
    maps = build_maps(rpe, 14, 14, skip=1)
    assert count_buckets(maps) == used
    assert {each.ratio for each in maps} == {ratio}
    assert BucketMap.build(maps[0].method, 2, 2).ratio == ratio
    assert f"in use={len(maps[0].used_ids)}" in repr(maps[0])
