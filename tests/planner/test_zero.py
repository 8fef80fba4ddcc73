"""ZeRO settings with DeepSpeed and without it, and the version that plans are counted for."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.errors import ConfigError
from irpe_ds.planner import deepspeed
from irpe_ds.planner.deepspeed import version_note
from irpe_ds.planner.zero import OPTIONS, Zero, read_zero, zero_of
from irpe_ds.training.deepspeed_config import parse_zero

FILES = sorted(Path("ds_configs").glob("*.json"))


@pytest.fixture
def no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)


def test_defaults_are_deepspeeds() -> None:
    values = parse_zero({"stage": 0}, "").model_dump(by_alias=True)
    values |= {key: values[key] is not None for key in ("offload_optimizer", "offload_param")}
    assert {key: values[key] for key in OPTIONS} == {
        key: vars(Zero(stage=0))[key] for key in OPTIONS
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_same_without_deepspeed(path: Path, request: pytest.FixtureRequest) -> None:
    expected = read_zero(path)
    request.getfixturevalue("no_deepspeed")
    assert read_zero(path) == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_defaults_of_a_stage(stage: int, request: pytest.FixtureRequest) -> None:
    expected = zero_of({"stage": stage})
    assert expected.overlap_comm == (stage == 3)
    request.getfixturevalue("no_deepspeed")
    assert zero_of({"stage": stage}) == expected


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "zero_optimization.overlap_com"),
        (
            {"zero_optimization": {"stage": 1}, "communication_data_type": "int8"},
            "communication_data_type: expected one of fp16",
        ),
    ],
)
def test_mistakes(ds_config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ds_config))
    with pytest.raises(ConfigError, match=rf"x\.json: {message}"):
        read_zero(path)


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"deepspeed": "0.19.8"}, None),
        ({"deepspeed": "0.19.11"}, None),
        ({"deepspeed": "0.190.1"}, "DeepSpeed 0.19, but 0.190.1 is installed"),
        ({"deepspeed": "1.19.0"}, "DeepSpeed 0.19, but 1.19.0 is installed"),
        ({}, "DeepSpeed 0.19, but no DeepSpeed is installed"),
    ],
)
def test_another_version_is_noted(
    installed: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "package_versions", lambda: installed)
    note = version_note()
    assert (note is None) if said is None else (note is not None and said in note)
