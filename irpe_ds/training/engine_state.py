"""A training state as whole fp32 tensors by parameter name, whatever ZeRO has made of it.

DeepSpeed keeps master weights and AdamW's moments as flat shards, laid out by stage, precision and
number of ranks. Read and written one whole tensor at a time they depend on none of these: what one
run has saved, a run on other ranks or with another stage goes on with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS, EMA = "weights", "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's DynamicLossScaler remembers."""

State = dict[str, dict[str, Tensor]]
"""Kind (weights, exp_avg, exp_avg_sq, ema) -> parameter name -> tensor of the parameter's shape."""


class EngineState:
    """Reads and writes the master weights and the optimizer's state of a DeepSpeed engine.

    Args:
        ema: whether the optimizer keeps a moving average too.
    """

    def __init__(self, engine: Any, *, ema: bool) -> None:
        self._engine, self._optimizer = engine, engine.basic_optimizer
        self._kinds = (*MOMENTS, EMA) if ema else MOMENTS
        self._stage: int = engine.zero_optimization_stage()
        self._masters = _masters(engine) if self._stage == 0 else {}
        scaler = self._scaler()
        if scaler is not None:
            scaler.raise_error_at_min_scale = False  # the trainer counts what is left out

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                yield name, parameter

    def start(self, weights: Mapping[str, Tensor], step: int = 0) -> None:
        """Set the master weights, the moments to zero and the average to the weights.

        DeepSpeed itself would start from masters rounded to half precision, and without ZeRO from
        an optimizer that has already taken a step of weight decay.

        Args:
            step: updates that the moments stand for, which AdamW's bias correction counts.
        """
        for tensor in self._optimized():
            # On the device where it is fused, an integer in DeepSpeed's AdamW for the host.
            fused = "fused" in self._optimizer.defaults
            count = torch.tensor(float(step), device=tensor.device) if fused else step
            state = self._optimizer.state[tensor]
            state.clear()
            state["step"] = count
            for kind in self._kinds:
                state[kind] = torch.zeros_like(tensor, requires_grad=False)
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.write({kind: weights for kind in (WEIGHTS, EMA)})

    @torch.no_grad()
    def write(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set what is given; parameters that the model computes with are not refreshed."""
        for kind, tensors in state.items():
            if kind in (WEIGHTS, *self._kinds):
                for name, parameter in self.parameters():
                    self._set(parameter, kind, tensors[name])

    def read(self, *, keep: bool) -> State:
        """All of it on the CPU; every rank takes part, those that do not `keep` get names alone."""
        kinds = (WEIGHTS, *self._kinds)
        return {kind: self.read_kind(kind, keep=keep) for kind in kinds}

    def read_kind(self, kind: str, *, keep: bool) -> dict[str, Tensor]:
        """One kind of tensors on the CPU, gathered one by one."""
        found = {}
        for name, parameter in self.parameters():
            tensor = self._get(parameter, kind)
            if keep:
                found[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        return found

    def constants(self) -> dict[str, Tensor]:
        """The rest of the model's state dict on the CPU: buffers and what is not trained."""
        from deepspeed.runtime.zero import GatheredParameters

        trained = {name for name, _ in self.parameters()}
        found = {}
        for name, tensor in self._engine.module.state_dict(keep_vars=True).items():
            if name not in trained:
                partitioned = [tensor] if hasattr(tensor, "ds_id") else []
                with GatheredParameters(partitioned):
                    copy = tensor.detach().to("cpu", copy=True).contiguous()
                found[name] = copy.float() if copy.is_floating_point() else copy
        return found

    def steps(self) -> int:
        """Updates that the optimizer has taken."""
        return int(self._optimizer.state[self._optimized()[0]]["step"])

    def loss_scaler(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None but in fp16."""
        scaler = self._scaler()
        return None if scaler is None else {key: getattr(scaler, key) for key in SCALER}

    def set_loss_scaler(self, saved: Mapping[str, float] | None) -> None:
        """Go on with a dynamic loss scale, where both runs have one."""
        scaler = self._scaler()
        if scaler is not None and saved is not None:
            for key in SCALER:
                setattr(scaler, key, saved[key])

    def loss_scale_can_sink(self) -> bool:
        """Whether an overflow is the dynamic loss scale's to deal with."""
        scaler = self._scaler()
        return scaler is not None and scaler.cur_scale > scaler.min_scale

    def _scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _get(self, parameter: Any, kind: str) -> Tensor:
        if self._stage == 0:
            return self._whole(parameter, kind)
        key = None if kind == WEIGHTS else kind
        if self._stage < 3:
            return parameter.get_full_hp_param(key)
        return self._engine.optimizer.get_full_hp_param(parameter, key)

    def _set(self, parameter: Any, kind: str, value: Tensor) -> None:
        if self._stage == 0:
            self._whole(parameter, kind).copy_(value)
            return
        key = None if kind == WEIGHTS else kind
        if self._stage < 3:
            parameter.set_full_hp_param(value, key)
            return
        # DeepSpeed's call for whole tensors forgets that the last partition is padded.
        zero: Any = self._engine.optimizer
        size = parameter.ds_tensor.numel()
        first = size * zero._get_param_partition_rank(parameter)
        own = value.flatten()[first : first + size]
        zero.set_local_hp_param(F.pad(own, (0, size - own.numel())), parameter, key)

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A tensor that is not partitioned."""
        master = self._masters.get(parameter, parameter)
        return master if kind == WEIGHTS else self._optimizer.state[master][kind]

    def _optimized(self) -> list[Tensor]:
        """What the optimizer of this rank updates: parameters, their masters, or shards of them."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> fp32 master in half precision without ZeRO, which DeepSpeed has no call for."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {p: m for halves, masters in groups for p, m in zip(halves, masters, strict=True)}
