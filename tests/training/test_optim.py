"""AdamW's groups and the schedule."""

import math

import pytest
import timm
import torch

import irpe_ds  # noqa: F401  (registers the zoo)
from irpe_ds.config import RunConfig
from irpe_ds.training.optim import build_optimizer, build_schedule


@pytest.fixture
def config() -> RunConfig:
    values = {
        "name": "x",
        "model": {"name": "deit"},
        "data": {"train": "a", "val": "b"},
        "optim": {"lr": 5e-4, "warmup_epochs": 2, "weight_decay": 0.05},
        "train": {"epochs": 10, "global_batch": 1024},
    }
    return RunConfig.model_validate(values)


def test_tables_decay_and_exempt_names_do_not(config: RunConfig) -> None:
    model = timm.create_model("deit_tiny_patch16_224_ctx_product_50_shared_k", depth=2)
    decays = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, config).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        exempt = name in ("pos_embed", "cls_token") or parameter.ndim < 2
        assert decays.pop(id(parameter)) == (0.0 if exempt else 0.05), name
    assert not decays


def test_schedule_is_warmup_then_cosine_per_update(config: RunConfig) -> None:
    optimizer = build_optimizer(torch.nn.Linear(3, 3), config)
    schedule = build_schedule(optimizer, config, updates_per_epoch=10)

    def lr(update: int) -> float:
        schedule.step_update(update)
        return optimizer.param_groups[0]["lr"]

    peak = 5e-4 * 1024 / 512
    assert lr(0) == pytest.approx(1e-6)
    assert lr(10) == pytest.approx(1e-6 + (peak - 1e-6) / 2)
    for update in (20, 50, 99):
        cosine = 0.5 * (1 + math.cos(math.pi * update / 100))
        assert lr(update) == pytest.approx(1e-5 + (peak - 1e-5) * cosine)
    assert lr(10) == pytest.approx(1e-6 + (peak - 1e-6) / 2)  # a function of the update
