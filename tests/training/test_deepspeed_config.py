"""Who owns which number of DeepSpeed's configuration."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from irpe_ds.config import OptimConfig, RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.planner.zero import read_zero
from irpe_ds.training.deepspeed_config import (
    OWNED_BY_YAML,
    deepspeed_config,
    read_ds_config,
    sums_in_fp32,
)

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
    assert "torch_autocast" not in settings


@pytest.mark.parametrize(
    ("precision", "ranks", "given", "found"),
    [
        ("bf16", 4, {}, "fp32"),
        ("bf16", 4, {"communication_data_type": "bf16"}, "bf16"),
        ("bf16", 1, {}, None),
        ("fp32", 4, {}, None),
        ("autocast", 4, {}, None),
    ],
)
def test_ranks_sum_gradients_in_fp32_unless_the_json_says_otherwise(
    precision: str, ranks: int, given: dict[str, str], found: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "zero1.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **given}))
    config = run_config(deepspeed=path, global_batch=16, precision=precision)
    assert deepspeed_config(config, ranks).get("communication_data_type") == found


class TestGradientSums:
    @pytest.mark.parametrize(
        ("stage", "precision", "accumulation", "given", "sums", "deepspeed"),
        [
            (2, "bf16", 3, None, True, "fp32"),
            (3, "fp16", 3, "fp32", True, "fp32"),
            (0, "bf16", 3, None, True, None),  # GradientSums
            (1, "bf16", 3, "fp32", True, None),
            (2, "bf16", 1, None, False, None),
            (2, "bf16", 3, "bf16", False, None),
            (2, "fp32", 3, None, False, None),
            (2, "autocast", 3, None, False, None),
        ],
    )
    def test_are_in_fp32_unless_the_json_says_otherwise(
        self,
        stage: int,
        precision: str,
        accumulation: int,
        given: str | None,
        sums: bool,
        deepspeed: str | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        config = with_sums(tmp_path, stage, given, precision=precision, accumulation=accumulation)
        assert sums_in_fp32(config) == sums
        found = deepspeed_config(config, world_size=1).get("data_types")
        assert found == (deepspeed and {"grad_accum_dtype": deepspeed})

    @pytest.mark.parametrize(("precision", "given"), [("bf16", "fp16"), ("fp32", "bf16")])
    def test_in_a_type_that_is_not_the_models(
        self, precision: str, given: str, tmp_path: Path
    ) -> None:
        config = with_sums(tmp_path, 2, given, precision=precision)
        with pytest.raises(ConfigError, match=rf"grad_accum_dtype: expected fp32.*got \"{given}\""):
            deepspeed_config(config, world_size=1)


def with_sums(folder: Path, stage: int, dtype: str | None, **train: object) -> RunConfig:
    """A run with `data_types.grad_accum_dtype` in its JSON, if it is given."""
    path = folder / "mine.json"
    data_types = {"data_types": {"grad_accum_dtype": dtype}} if dtype else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}} | data_types))
    return run_config(deepspeed=path, global_batch=96, **train)


def test_autocast_is_pytorchs() -> None:
    config = run_config(deepspeed=DS_CONFIGS / "zero0.json", precision="autocast")
    settings = deepspeed_config(config, world_size=1)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not {"bf16", "fp16", "autocast"} & settings.keys()


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"),
    [
        ("zero1_offload", 1, {"offload_optimizer"}),
        ("zero2_offload", 2, {"offload_optimizer"}),
        ("zero3_offload", 3, {"offload_optimizer", "offload_param"}),
    ],
)
def test_offloading(name: str, stage: int, offloaded: set[str]) -> None:
    config = run_config(deepspeed=DS_CONFIGS / f"{name}.json")
    zero = deepspeed_config(config, world_size=1)["zero_optimization"]
    assert zero["stage"] == stage
    found = {key: zero[key] for key in zero if key.startswith("offload_")}
    assert found == {key: {"device": "cpu"} for key in offloaded}


class TestQuantisedCommunication:
    def test_is_refused_on_the_cpu(self) -> None:
        config = run_config(deepspeed=DS_CONFIGS / "zeropp.json")
        with pytest.raises(ConfigError, match=r"zeropp\.json: .*zero_quantized_weights: .* GPUs"):
            deepspeed_config(config, world_size=8)

    @pytest.mark.parametrize(("ranks", "runs"), [(8, True), (16, True), (4, False), (12, False)])
    def test_runs_on_whole_nodes_of_gpus(
        self, ranks: int, runs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accelerator = get_accelerator()
        monkeypatch.setattr(type(accelerator), "device_name", lambda self: "cuda")
        config = run_config(deepspeed=DS_CONFIGS / "zeropp.json", global_batch=192)
        with nullcontext() if runs else pytest.raises(ConfigError, match="hpz_partition_size"):
            settings = deepspeed_config(config, world_size=ranks)
            assert settings["zero_optimization"]["zero_quantized_gradients"] is True


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
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ("offload_optimizer", "stage 1 or more", "got stage 0"),
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ("offload_param", "stage 3 or more", "got stage 2"),
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ("offload_param", "device cpu", "the moving average", "nvme"),
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            ("offload_optimizer", "device cpu", "the moving average", "nvme"),
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"pin_memory": True}}},
            ("offload_optimizer", "device cpu", '{"pin_memory": true}'),
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            ("offload_optimizer", "at most pin_memory", '"ratio": 0.5'),
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            ("zero_quantized_weights", "without NVIDIA GPUs", "true on cpu"),
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            ("zero_quantized_gradients", "without NVIDIA GPUs", "true on cpu"),
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
            ("zero_hpz_partition_size", "divide the 4 ranks", "3"),
        ),
    ],
)
def test_what_deepspeed_would_not_take(
    settings: dict[str, object], parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as error:
        deepspeed_config(run_config(deepspeed=path), world_size=4)
    for part in (str(path), *parts):
        assert part in str(error.value)


def test_only_adamw_is_offloaded() -> None:
    config = run_config(deepspeed=DS_CONFIGS / "zero2_offload.json")
    config = config.model_copy(update={"optim": OptimConfig.model_validate({"name": "lion"})})
    expected = "offload_optimizer: expected null without AdamW, got optim.name lion"
    with pytest.raises(ConfigError, match=expected):
        deepspeed_config(config, world_size=2)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": true}}', "stage of 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 1.0}}', "stage of 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": []}}', "stage of 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "key 'stage' twice"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": NaN}}', "the number NaN"),
        ('{"zero_optimization": {"stage": 1, "self": 1}}', r"optimization\.self: .*no such key"),
        ('{"zero_optimization": {"stage": 1, "strict": 1}}', r"\.strict: .*no such key"),
        ('{"zero_optimization": {"stage": 3, "leaf_module": 1}}', "that DeepSpeed accepts"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}', "hpz_partition_size"),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', "offload_param"),
        ('{"zero_optimization": {"stage": 1}, "communication_data_type": []}', "data_type: expect"),
        (
            '{"zero_optimization": {"stage": 1}, "communication_data_type": "x"}',
            "one of fp16, bf16",
        ),
        ('{"zero_optimization": {"stage": 1}, "prescale_gradients": "no"}', "prescale_gradients"),
        ('{"zero_optimization": {"stage": 1}, "gradient_predivide_factor": 0}', "greater than 0"),
        ('{"zero_optimization": {"stage": 1}, "comms_logger": 1}', "comms_logger: expected"),
        (
            '{"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": []}}',
            "accum_dtype",
        ),
        ("[" * 5000, "too many nested brackets"),
        ('{"zero_optimization": ' + '{"a": ' * 400 + "1" + "}" * 401, "at most 16 levels"),
        ("\x00" * 100, "valid JSON"),
    ],
    ids=lambda text: text[:60],
)
def test_json_that_parses_is_not_yet_right(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(run_config(deepspeed=path), world_size=2)
    with pytest.raises(ConfigError, match=message):
        read_zero(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.json")
    with pytest.raises(ConfigError, match=r"train\.deepspeed: .*mine\.json: not a regular file"):
        read_ds_config(tmp_path / "mine.json")
