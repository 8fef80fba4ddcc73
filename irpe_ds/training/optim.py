"""Optimizers with a moving average of the weights, parameter groups and the cosine schedule."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from irpe_ds.checkpoint.reader import EMA
from irpe_ds.config import OptimConfig, RunConfig, TrainConfig
from irpe_ds.config_types import OptimizerName


class _WithEMA:
    """What the optimizers here add to their base classes.

    The average is part of the optimizer's state, like the moments: however ZeRO partitions or
    offloads a parameter, its average is partitioned, offloaded, gathered and saved with it.

    Args:
        ema_decay: average = decay * average + (1 - decay) * weights after every update that is
            applied. None: no average.
        skip_nonfinite: skip an update if a gradient is not finite. With ZeRO or in half precision
            DeepSpeed does this itself.
    """

    name: OptimizerName = "adamw"
    overflow = False
    """Whether the last update was skipped; DeepSpeed's engine reads it under this name."""

    def __init__(
        self, groups: Iterable[Any], *, ema_decay: float | None, skip_nonfinite: bool, **own: Any
    ) -> None:
        super().__init__(groups, **own)  # type: ignore[call-arg]
        self.ema_decay, self.skip_nonfinite = ema_decay, skip_nonfinite

    def as_step(self, count: int, _: torch.device) -> int | Tensor:
        """A number of updates as the base class keeps it, for the state of a tensor there."""
        return count

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], float] | None = None) -> Any:
        """Update every tensor that has a gradient, and its average."""
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.skip_nonfinite and tensors:
            self.overflow = not _all_finite([p.grad for p in tensors])
            if self.overflow:
                return None
        result = super().step(closure)  # type: ignore[misc]
        if self.ema_decay is not None:
            averages = [self.state[p][EMA] for p in tensors if EMA in self.state[p]]
            # DeepSpeed 0.19.8 takes a step with zero gradients in initialize(), before there are
            # averages. Without the check torch refuses an empty list.
            if averages:
                torch._foreach_lerp_(averages, tensors, 1 - self.ema_decay)
        return result


class _Counting(_WithEMA):
    """Counts updates where the base class does not."""

    def step(self: Any, closure: Callable[[], float] | None = None) -> Any:
        """Update every tensor that has a gradient."""
        result = super().step(closure)
        for group in self.param_groups if not self.overflow else ():
            for state in (self.state[p] for p in group["params"] if p.grad is not None):
                state["step"] = state.get("step", 0) + 1
        return result


class AdamW(_WithEMA, torch.optim.AdamW):
    """PyTorch's fused AdamW, with a moving average."""

    def __init__(self, groups: Iterable[Any], **own: Any) -> None:
        super().__init__(groups, fused=True, **own)

    def as_step(self, count: int, device: torch.device) -> Tensor:
        return torch.tensor(float(count), device=device)


class NAdamW(_WithEMA, timm.optim.NAdamW):
    """timm's NAdamW, with a moving average."""

    name = "nadamw"

    def as_step(self, count: int, _: torch.device) -> Tensor:
        return torch.tensor(float(count), device="cpu")


class Lion(_Counting, timm.optim.Lion):
    """timm's Lion, with a moving average."""

    name = "lion"


class SGD(_Counting, torch.optim.SGD):
    """PyTorch's SGD, with a moving average."""

    name = "sgd"


OPTIMIZERS: dict[OptimizerName, Any] = {x.name: x for x in (AdamW, NAdamW, Lion, SGD)}


def cpu_adamw() -> type[torch.optim.Optimizer]:
    """DeepSpeed's AdamW for optimizer states offloaded to the host, with a moving average."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return type("CPUAdamW", (_WithEMA, DeepSpeedCPUAdam), {})


def build_optimizer(
    groups: list[dict[str, Any]], config: RunConfig, ds_config: dict[str, Any]
) -> torch.optim.Optimizer:
    """The run's, with its moving average; on the host if `ds_config` offloads the optimizer.

    Args:
        groups: of `parameter_groups`.
    """
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    optim, zero = config.optim, ds_config["zero_optimization"]
    arguments: dict[str, Any] = {
        "lr": peak_lr(config),
        "ema_decay": config.train.ema_decay,
        # ZeRO and half precision check all gradients before they call the optimizer.
        "skip_nonfinite": zero["stage"] == 0 and config.train.precision in ("fp32", "autocast"),
    }
    make = cpu_adamw() if zero.get("offload_optimizer") else OPTIMIZERS[optim.name]
    optimizer = make(groups, **own_arguments(optim), **arguments)
    # DeepSpeed 0.19.8 refuses subclasses of its supported optimizers with ZeRO, unless
    # zero_allow_untested_optimizer is set, and then warns. The comparison is by exact type.
    ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
    return optimizer


def own_arguments(optim: OptimConfig) -> dict[str, Any]:
    """The arguments that not all optimizers have."""
    assert optim.betas is not None
    if optim.name == "sgd":
        return {"momentum": optim.betas[0], "nesterov": optim.betas[0] > 0}
    eps = {} if optim.name == "lion" else {"eps": optim.eps}
    return {"betas": optim.betas, **eps}


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Which tensors have weight decay and, with optim.layer_decay, the `lr_scale` of each layer.

    One-dimensional tensors and the model's exempt names have no weight decay. Relative position
    tables have two dimensions or more and do, as in the released recipe; they belong to their
    block's layer. The schedule multiplies a group's learning rate by `lr_scale`, 1 for the head.
    """
    exempt: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    optim = config.optim
    if optim.layer_decay == 1:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exempt)
        return [group for group in groups if group["params"]]
    return param_groups_layer_decay(
        model, optim.weight_decay, no_weight_decay_list=exempt, layer_decay=optim.layer_decay
    )


def peak_lr(config: RunConfig) -> float:
    """optim.lr under the linear scaling rule: lr * global_batch / lr_batch."""
    return config.optim.lr * config.train.global_batch / config.optim.lr_batch


def ema_decay_at(train: TrainConfig, update: int) -> float | None:
    """The decay of the average in the update after this many.

    With train.ema_warmup as of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    if train.ema_decay is None or not train.ema_warmup:
        return train.ema_decay
    return min(train.ema_decay, (1 + update) / (10 + update))


def build_schedule(
    optimizer: torch.optim.Optimizer, config: RunConfig, updates_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up, then cosine decay to min_lr at the last update; `step_update(n)` sets it.

    A function of n alone, so that checkpoints need no state of it.
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


def _all_finite(gradients: list[Tensor]) -> bool:
    norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
    return bool(torch.isfinite(norms).all())
