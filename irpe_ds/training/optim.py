"""AdamW and the cosine schedule, as DeiT's recipe has them."""

from collections.abc import Collection
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from irpe_ds.config import RunConfig
from irpe_ds.training.adamw import AdamW, host_adamw


def build_optimizer(
    model: nn.Module, config: RunConfig, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW with the moving average that the run keeps, on the host where `settings` offload it."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    optim, zero = config.optim, settings["zero_optimization"]
    arguments: dict[str, Any] = {
        "lr": peak_lr(config),
        "betas": optim.betas,
        "eps": optim.eps,
        "ema_decay": config.train.ema_decay,
        # ZeRO looks at all gradients before it calls the optimizer, as does half precision.
        "skips_non_finite": zero["stage"] == 0 and config.train.precision in ("fp32", "autocast"),
    }
    groups = parameter_groups(model, config)
    if zero.get("offload_optimizer"):
        optimizer = host_adamw()(groups, **arguments)
    else:
        optimizer = AdamW(groups, fused=True, **arguments)
    ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # or it warns of what our tests test
    return optimizer


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Which tensors decay, and with optim.layer_decay how fast each layer learns.

    Tensors of one dimension and the model's exempt names do not decay. Relative position tables
    have two dimensions or more and do, as in the released recipe; they learn with their block. The
    schedule multiplies a group's learning rate with its `lr_scale`, 1 for the head.
    """
    exempt: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    optim = config.optim
    if optim.layer_decay == 1:
        return param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exempt)
    return param_groups_layer_decay(
        model, optim.weight_decay, no_weight_decay_list=exempt, layer_decay=optim.layer_decay
    )


def peak_lr(config: RunConfig) -> float:
    """optim.lr under the linear scaling rule: lr * global_batch / lr_batch."""
    return config.optim.lr * config.train.global_batch / config.optim.lr_batch


def build_schedule(
    optimizer: torch.optim.Optimizer, config: RunConfig, updates_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to min_lr at the last update; `step_update(n)` sets update n.

    A function of n alone, so that a resumed run needs no state of it.
    """
    optim = config.optim
    return CosineLRScheduler(
        optimizer,
        t_initial=config.train.epochs * updates_per_epoch,
        lr_min=optim.min_lr,
        warmup_t=round(optim.warmup_epochs * updates_per_epoch),
        warmup_lr_init=optim.warmup_lr,
        t_in_epochs=False,
    )
