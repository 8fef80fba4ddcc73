"""What a careful colleague would say of a configuration."""

from pathlib import Path

import pytest
import torch

from irpe_ds.config import RunConfig, load_config
from irpe_ds.training.start import cautions, run_length


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    train = {"epochs": 10, "global_batch": 64}
    return RunConfig.model_validate(values | {"output": tmp_path, "train": train})


def test_an_average_over_more_updates_than_the_run_has_is_pointed_out(config: RunConfig) -> None:
    length = run_length(config, 640)  # 100 updates
    values = config.model_dump() | {"train": config.train.model_dump() | {"precision": "fp32"}}
    for decay, expected in ((None, 0), (0.9, 0), (0.999, 1)):
        values["train"]["ema_decay"] = decay
        found = cautions(RunConfig.model_validate(values), length)
        assert len(found) == expected, decay
    assert "100 updates the average is still 90% first weights" in found[0]


@pytest.mark.parametrize("supported", [True, False])
def test_emulated_bf16_is_pointed_out(
    supported: bool, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert bool(cautions(config, run_length(config, 640))) != supported


DEIT3, AUGREG = "deit3_small_patch16_224", "vit_small_patch16_224"
"""timm knows the second with a mean of 0.5."""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (
            ["train.global_batch=64"],
            ["optim.min_lr=5e-06 is above the peak learning rate 6.25e-07"],
        ),
        (
            ["optim.warmup_lr=0.1", "optim.warmup_epochs=1"],
            ["optim.warmup_lr=0.1 is above the peak learning rate 5e-06"],
        ),
        (["optim.warmup_lr=0.1", "optim.warmup_epochs=0"], []),
        (["model.num_classes=1"], ["model.num_classes=1: every image"]),
        ([f"model.name={DEIT3}"], []),
        (
            [f"model.name={AUGREG}"],
            [
                f"data.mean=[0.485, 0.456, 0.406], but weights of model.name={AUGREG} expect [0.5",
                f"data.std=[0.229, 0.224, 0.225], but weights of model.name={AUGREG} expect [0.5",
            ],
        ),
        ([f"model.name={AUGREG}", "model.weights=null"], []),
        ([f"model.name={AUGREG}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"], []),
        (
            [f"distill.teacher={AUGREG}", "distill.kind=hard", "distill.weights=x"],
            ["data.mean=[0.485, 0.456, 0.406], but weights of distill.teacher=", "data.std="],
        ),
    ],
)
def test_numbers_that_make_no_sense_together_are_pointed_out(
    overrides: list[str], expected: list[str]
) -> None:
    own = ["train.precision=fp32", "train.ema_decay=null", "optim.warmup_lr=0"]
    config = load_config("launch/configs/imagenet/finetune.yaml", own + overrides)
    found = cautions(config, run_length(config, 64_000))
    assert len(found) == len(expected), found
    for text, beginning in zip(found, expected, strict=True):
        assert text.startswith(f"caution: {beginning}")
