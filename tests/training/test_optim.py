"""Optimizers, their groups and the schedule."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from irpe_ds import RPEConfig, equip
from irpe_ds.config import OptimConfig, RunConfig
from irpe_ds.training.optim import (
    OPTIMIZERS,
    build_optimizer,
    build_schedule,
    parameter_groups,
    peak_lr,
)

ZOO_K = "deit_tiny_patch16_224_ctx_product_50_shared_k"

ZERO1 = {"zero_optimization": {"stage": 1}}


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


def with_layer_decay(config: RunConfig, decay: float) -> RunConfig:
    optim = config.optim.model_copy(update={"layer_decay": decay})
    return config.model_copy(update={"optim": optim})


def of_each(groups: list[dict[str, Any]], key: str) -> dict[int, float]:
    """What the group of each parameter says, by the parameter's id; none is in two groups."""
    found = [(id(p), group[key]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_tables_decay_and_exempt_names_do_not(config: RunConfig) -> None:
    model = timm.create_model(ZOO_K, depth=2)
    decays = of_each(parameter_groups(model, config), "weight_decay")
    for name, parameter in model.named_parameters():
        exempt = name in ("pos_embed", "cls_token") or parameter.ndim < 2
        assert decays.pop(id(parameter)) == (0.0 if exempt else 0.05), name
    assert not decays


@pytest.mark.parametrize("name", [ZOO_K, "deit_tiny_distilled_patch16_224"])
def test_layers_learn_slower_the_deeper_they_lie(name: str, config: RunConfig) -> None:
    model = timm.create_model(name, depth=2)
    if name != ZOO_K:
        equip(model, RPEConfig(on="qkv"))
    groups = parameter_groups(model, with_layer_decay(config, 0.5))
    scales, decays = of_each(groups, "lr_scale"), of_each(groups, "weight_decay")
    # In timm's grouping the final norm belongs to the last block.
    expected = {"head": 1.0, "norm": 0.5, "blocks.1": 0.5, "blocks.0": 0.25}
    exempt = ("pos_embed", "cls_token", "dist_token")
    for key, parameter in model.named_parameters():
        layer = ".".join(key.split(".")[: 2 if key.startswith("blocks.") else 1])
        scale = expected.get(layer.removesuffix("_dist"), 0.125)
        assert scales.pop(id(parameter)) == pytest.approx(scale), key
        decay = 0.0 if key in exempt or parameter.ndim < 2 else 0.05
        assert decays.pop(id(parameter)) == decay, key
    assert not scales
    tables = [key for key, _ in model.named_parameters() if "rpe_" in key]
    assert len(tables) == (2 if name == ZOO_K else 6)


def test_the_schedule_goes_by_layer(config: RunConfig) -> None:
    model = timm.create_model(ZOO_K, depth=2)
    groups = parameter_groups(model, with_layer_decay(config, 0.5))
    optimizer = torch.optim.AdamW(groups, lr=peak_lr(config))
    plain = torch.optim.AdamW([model.head.weight], lr=peak_lr(config))
    schedule, reference = (
        build_schedule(x, config, updates_per_epoch=10) for x in (optimizer, plain)
    )
    for update in (0, 7, 20, 60, 99):
        schedule.step_update(update)
        reference.step_update(update)
        lr = plain.param_groups[0]["lr"]
        found = {group["lr"] for group in optimizer.param_groups}
        assert sorted(found) == pytest.approx([lr / 8, lr / 4, lr / 2, lr])


def test_schedule_is_warmup_then_cosine_per_update(config: RunConfig) -> None:
    groups = parameter_groups(torch.nn.Linear(3, 3), config)
    optimizer = torch.optim.AdamW(groups, lr=peak_lr(config))
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


Tensors = Sequence[torch.Tensor]


def updated(make: Any, tensors: Tensors, gradients: Tensors) -> torch.Tensor:
    """The numbers of these tensors after three updates."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer = make(parameters)
    for step in range(3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * torch.cos(3 * step * gradient)  # some change their sign
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def is_element_wise(make: Any) -> bool:
    """Whether pieces of joined tensors, as ZeRO has them, are updated as the tensors are."""
    rng = torch.Generator().manual_seed(0)
    tensors = torch.randn(20, 24, generator=rng), torch.randn(5, generator=rng)
    gradients = [torch.randn(x.shape, generator=rng) for x in tensors]
    for x, gradient in zip(tensors, gradients, strict=True):  # orthogonal, which AdamP looks for
        gradient -= x * (gradient * x).sum() / (x * x).sum()
    pieces, of_gradients = (
        torch.cat([x.flatten() for x in whole]).split([200, 285]) for whole in (tensors, gradients)
    )
    expected, got = updated(make, tensors, gradients), updated(make, pieces, of_gradients)
    assert not torch.allclose(got, torch.cat(pieces), atol=1e-4)
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_element_wise(name: str, config: RunConfig) -> None:
    optim = OptimConfig.model_validate({"name": name, "lr": 0.01, "lr_batch": 1024})
    run = config.model_copy(update={"optim": optim})
    assert is_element_wise(lambda p: build_optimizer([{"params": p}], run, ZERO1))


@pytest.mark.parametrize("name", ["lamb", "lars", "adamp", "adafactor", "cadamw", "muon"])
def test_timm_s_others_are_not(name: str) -> None:
    """Norms, means, projections or products of a whole tensor: no value of optim.name."""
    assert name not in OPTIMIZERS
    assert not is_element_wise(lambda p: create_optimizer_v2(p, name, lr=0.3, weight_decay=0.05))


def test_betas_are_those_of_the_optimizer() -> None:
    betas = {name: OptimConfig.model_validate({"name": name}).betas for name in OPTIMIZERS}
    assert betas == {name: (0.9, 0.99 if name == "lion" else 0.999) for name in OPTIMIZERS}
    assert OptimConfig.model_validate({"name": "lion", "betas": (0.95, 0.98)}).betas == (0.95, 0.98)
