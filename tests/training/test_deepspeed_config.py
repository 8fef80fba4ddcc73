"""Who owns which number of DeepSpeed's configuration."""

import json
from pathlib import Path

import pytest

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.training.deepspeed_config import OWNED_BY_YAML, deepspeed_config

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def run_config(**train: object) -> RunConfig:
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    return RunConfig.model_validate(values | {"train": train})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_gets_the_yaml_numbers(stage: int) -> None:
    config = run_config(
        deepspeed=DS_CONFIGS / f"zero{stage}.json",
        global_batch=96,
        accumulation=3,
        precision="bf16",
    )
    settings = deepspeed_config(config, world_size=4)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_batch_size"] == 96
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["bf16"] == {"enabled": True}
    assert "fp16" not in settings


@pytest.mark.parametrize("key", OWNED_BY_YAML)
def test_json_that_sets_a_yaml_number_names_both(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 7}))
    with pytest.raises(ConfigError) as error:
        deepspeed_config(run_config(deepspeed=path), world_size=1)
    for part in (str(path), key, OWNED_BY_YAML[key], "7"):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"zero_optimization": {"stage": 5}}'])
def test_json_without_a_stage_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json: expected"):
        deepspeed_config(run_config(deepspeed=path), world_size=1)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"zero_optimization": {"stage": 1}, "data_efficiency": {}},
            ("data_efficiency", "only ZeRO"),
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            ("zero_optimization.overlap_com",),
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            ("offload_optimizer", "AdamW"),
        ),
    ],
)
def test_what_deepspeed_would_not_take(
    settings: dict[str, object], parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as error:
        deepspeed_config(run_config(deepspeed=path), world_size=1)
    for part in (str(path), *parts):
        assert part in str(error.value)


def test_fp16_needs_zero() -> None:
    config = run_config(deepspeed=DS_CONFIGS / "zero0.json", precision="fp16")
    with pytest.raises(ConfigError, match=r"train\.precision: .*fp16 with stage 0"):
        deepspeed_config(config, world_size=1)


def test_missing_json_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"train\.deepspeed: .*nowhere\.json"):
        deepspeed_config(run_config(deepspeed="nowhere.json"), world_size=1)


def test_batch_must_divide() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch: expected a multiple .* 4 x 1"):
        deepspeed_config(run_config(deepspeed=DS_CONFIGS / "zero1.json", global_batch=10), 4)


def test_mixup_needs_even_batches() -> None:
    config = run_config(deepspeed=DS_CONFIGS / "zero1.json", global_batch=12)
    config = config.model_copy(update={"augment": config.augment.model_copy(update={"mixup": 0.8})})
    with pytest.raises(ConfigError, match="even number"):
        deepspeed_config(config, world_size=4)
