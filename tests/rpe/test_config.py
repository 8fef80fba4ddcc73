"""RPEConfig: a typo is an error that names its field, never a model without encoding."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import RPEConfig


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
    assert (rpe.method, rpe.mode, rpe.on, rpe.ratio, rpe.shared_heads) == expected
