"""AdamW that keeps a moving average of what it updates.

The average is a part of the optimizer's state, like the moments: whatever ZeRO makes of a
parameter, its average is partitioned, offloaded, gathered and saved with it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from irpe_ds.training.engine_state import EMA


class _Averaging:
    """What `AdamW` and `HostAdamW` add to their bases.

    Args:
        ema_decay: the average becomes decay * average + (1 - decay) * weights at every update
            that is taken. None: none is kept.
        skips_non_finite: leave an update out when a gradient is not finite. With ZeRO or in half
            precision DeepSpeed has looked before.
    """

    overflow = False
    """Whether the last update was left out; DeepSpeed's engine looks for it under this name."""

    def __init__(
        self, groups: Iterable[Any], *, ema_decay: float | None, skips_non_finite: bool, **own: Any
    ) -> None:
        super().__init__(groups, **own)  # type: ignore[call-arg]
        self.ema_decay, self.skips_non_finite = ema_decay, skips_non_finite

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], float] | None = None) -> Any:
        """One update of every tensor that has a gradient, and of its average."""
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.skips_non_finite and tensors:
            self.overflow = not _all_finite([p.grad for p in tensors])
            if self.overflow:
                return None
        result = super().step(closure)  # type: ignore[misc]
        if self.ema_decay is not None:
            averages = [self.state[p][EMA] for p in tensors if EMA in self.state[p]]
            if averages:  # DeepSpeed may step before there is a state
                torch._foreach_lerp_(averages, tensors, 1 - self.ema_decay)
        return result


class AdamW(_Averaging, torch.optim.AdamW):
    """PyTorch's AdamW, fused, with an average."""


def host_adamw() -> type[torch.optim.Optimizer]:
    """DeepSpeed's AdamW for masters that are offloaded to the host, with an average."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return type("HostAdamW", (_Averaging, DeepSpeedCPUAdam), {})


def _all_finite(gradients: list[Tensor]) -> bool:
    norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
    return bool(torch.isfinite(norms).all())
