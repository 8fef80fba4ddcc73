"""AdamW and the cosine schedule, as DeiT's recipe has them."""

from collections.abc import Collection

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from irpe_ds.config import RunConfig


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW in two groups: tensors of one dimension and the model's exempt names do not decay.

    Relative position tables have two dimensions or more and decay, as in the released recipe.
    """
    exempt: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    optim = config.optim
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=peak_lr(config), betas=optim.betas, eps=optim.eps)


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
