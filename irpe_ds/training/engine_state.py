"""A training state as full fp32 tensors by parameter name, however ZeRO partitions it.

DeepSpeed keeps master weights and AdamW's moments as flat shards, laid out by stage, precision and
number of ranks. Read and written one full tensor at a time they depend on none of these: a run on
other ranks or with another stage can continue from what one run has saved.

Written for DeepSpeed 0.19.8, whose own checkpoints resume on another number of ranks or another
stage only in part. It uses attributes that are not in DeepSpeed's documented API:
tests/launch/test_survival.py fails if they change.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS, EMA = "weights", "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of DeepSpeed's DynamicLossScaler, which has no state_dict."""

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
            # DeepSpeed 0.19.8 would raise a bare Exception at the minimum scale; the trainer counts
            # skipped updates instead, up to train.max_skips.
            scaler.raise_error_at_min_scale = False

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters, by name."""
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                yield name, parameter

    def initialize(self, weights: Mapping[str, Tensor], step: int = 0) -> None:
        """Set the master weights, zero the moments and set the average to the weights.

        Without it DeepSpeed 0.19.8 starts from master weights rounded to half precision, and at
        stage 0 from an optimizer whose initial step has already applied weight decay. Remove it
        when the first losses are equal in all stages and precisions without it.

        Args:
            step: number of updates behind the moments, for AdamW's bias correction.
        """
        for tensor in self._optimized():
            # PyTorch's fused AdamW keeps it in a tensor on the device, DeepSpeed's for the host in
            # an integer.
            fused = "fused" in self._optimizer.defaults
            count = torch.tensor(float(step), device=tensor.device) if fused else step
            state = self._optimizer.state[tensor]
            state.clear()
            state["step"] = count
            for kind in self._kinds:
                state[kind] = torch.zeros_like(tensor, requires_grad=False)
        if self._stage in (1, 2):
            # Otherwise DeepSpeed 0.19.8 links parameters to the state only after the first step.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.write({kind: weights for kind in (WEIGHTS, EMA)})

    @torch.no_grad()
    def write(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the given tensors; half-precision copies of the weights change at the next update."""
        for kind, tensors in state.items():
            if kind in (WEIGHTS, *self._kinds):
                for name, parameter in self.parameters():
                    self._set(parameter, kind, tensors[name])

    def read(self, *, keep: bool) -> State:
        """All tensors on the CPU; every rank must call it, without `keep` for empty dicts."""
        kinds = (WEIGHTS, *self._kinds)
        return {kind: self.read_kind(kind, keep=keep) for kind in kinds}

    def read_kind(self, kind: str, *, keep: bool) -> dict[str, Tensor]:
        """The tensors of one kind on the CPU, gathered one by one."""
        found = {}
        for name, parameter in self.parameters():
            tensor = self._get(parameter, kind)
            if keep:
                found[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        return found

    def constants(self) -> dict[str, Tensor]:
        """The rest of the model's state dict on the CPU: buffers and frozen parameters."""
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
        """Number of updates that the optimizer has applied."""
        return int(self._optimizer.state[self._optimized()[0]]["step"])

    def loss_scaler(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None unless in fp16."""
        scaler = self._scaler()
        return None if scaler is None else {key: getattr(scaler, key) for key in SCALER}

    def set_loss_scaler(self, saved: Mapping[str, float] | None) -> None:
        """Restore a dynamic loss scale, if both runs have one."""
        scaler = self._scaler()
        if scaler is not None and saved is not None:
            for key in SCALER:
                setattr(scaler, key, saved[key])

    def loss_scale_can_drop(self) -> bool:
        """Whether the dynamic loss scaler handles an overflow by itself."""
        scaler = self._scaler()
        return scaler is not None and scaler.cur_scale > scaler.min_scale

    def _scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _get(self, parameter: Any, kind: str) -> Tensor:
        if self._stage == 0:
            return self._unpartitioned(parameter, kind)
        key = None if kind == WEIGHTS else kind
        if self._stage < 3:
            return parameter.get_full_hp_param(key)
        return self._engine.optimizer.get_full_hp_param(parameter, key)

    def _set(self, parameter: Any, kind: str, value: Tensor) -> None:
        if self._stage == 0:
            self._unpartitioned(parameter, kind).copy_(value)
            return
        key = None if kind == WEIGHTS else kind
        if self._stage < 3:
            parameter.set_full_hp_param(value, key)
            return
        # DeepSpeed 0.19.8's set_full_hp_param fails at stage 3 if the size is not a multiple of the
        # ranks: it does not pad the last partition.
        zero: Any = self._engine.optimizer
        size = parameter.ds_tensor.numel()
        first = size * zero._get_param_partition_rank(parameter)
        own = value.flatten()[first : first + size]
        zero.set_local_hp_param(F.pad(own, (0, size - own.numel())), parameter, key)

    def _unpartitioned(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A tensor at stage 0."""
        master = self._masters.get(parameter, parameter)
        return master if kind == WEIGHTS else self._optimizer.state[master][kind]

    def _optimized(self) -> list[Tensor]:
        """The tensors that this rank's optimizer updates: parameters, master weights or shards."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> fp32 master weight, for half precision at stage 0.

    DeepSpeed 0.19.8 has get_full_hp_param for the other stages only.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {p: m for halves, masters in groups for p, m in zip(halves, masters, strict=True)}
