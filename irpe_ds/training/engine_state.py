"""The training state of a DeepSpeed engine: what this rank holds of each parameter.

DeepSpeed keeps master weights and the optimizer's moments in fp32, as flat shards laid out by
stage, precision and number of ranks. Here they are ranges of the flattened parameters, by name,
which depend on none of these: a run on other ranks or with another stage can continue from them.

Written for DeepSpeed 0.19.8, whose own checkpoints resume on another number of ranks or another
stage only in part. It uses attributes that are not in DeepSpeed's documented API:
tests/launch/test_survival.py fails if they change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from irpe_ds.checkpoint.manifest import EMA, MOMENTS, WEIGHTS, LossScaler
from irpe_ds.checkpoint.shards import Shard
from irpe_ds.errors import CheckpointError

SCALER = fields(LossScaler)


class Source(Protocol):
    """Where a state is read from."""

    def __contains__(self, key: str) -> bool:
        """Whether it has the tensor KIND.NAME."""

    def read(self, key: str, start: int, count: int) -> Tensor:
        """The elements [start, start + count) of the flattened tensor KIND.NAME; (count,)."""


class EngineState:
    """This rank's part of an engine's master weights, moments and moving average, by kind and name.

    Args:
        ema: whether the optimizer keeps a moving average.
    """

    def __init__(self, engine: Any, *, ema: bool) -> None:
        self._engine, self._optimizer = engine, engine.basic_optimizer
        self.kinds = (WEIGHTS, *MOMENTS[self._optimizer.name], *([EMA] if ema else []))
        self._stage: int = engine.zero_optimization_stage()
        self._masters = _masters(engine) if self._stage == 0 else {}
        scaler = self._scaler()
        if scaler is not None:
            # DeepSpeed 0.19.8 would raise a bare Exception at the minimum scale; the trainer counts
            # skipped updates instead, up to train.max_skips.
            scaler.raise_error_at_min_scale = False

    @torch.no_grad()
    def load(self, source: Source, step: int = 0) -> None:
        """Set the state, and the model's tensors, from a checkpoint or from first values.

        DeepSpeed 0.19.8 would start from master weights rounded to half precision, and at stage 0
        from an optimizer whose initial step has already applied weight decay.

        Without moments in the source they are zero, without an average it is equal to the weights;
        buffers that it does not have stay as they are.

        Args:
            step: number of updates behind the moments, for a bias correction.
        """
        for tensor in self._optimized():
            state = self._optimizer.state[tensor]
            state.clear()
            state["step"] = self._optimizer.as_step(step, tensor.device)
            for kind in self.kinds[1:]:
                state[kind] = torch.zeros_like(tensor, requires_grad=False)
        if self._stage in (1, 2):
            # Otherwise DeepSpeed 0.19.8 links parameters to the state only after the first step.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        held = [(WEIGHTS, name, _held(tensor)) for name, tensor in self._constants()]
        held += [(kind, *named) for kind in self.kinds for named in self.shards(kind)]
        for kind, name, (start, values) in held:
            _fill(values, source, f"{kind}.{name}", start)
        for name, weights, average in self._pairs():
            if f"{EMA}.{name}" not in source:
                average.copy_(weights)
        self._refresh()

    def shards(self, kind: str) -> Iterator[tuple[str, Shard]]:
        """What this rank holds of each trained tensor: views, at stage 0 of the whole."""
        for name, parameter in self._trained():
            shard = self._shard(parameter, kind)
            if shard is not None:
                yield name, shard

    def copy_shards(self, rank: int, world_size: int) -> dict[str, Shard]:
        """Copies on the CPU of what this rank is to save, by kind.NAME.

        Shards of stages 1 to 3 are as they are; of what every rank holds, each saves its part.
        """
        found = {}
        for kind in self.kinds:
            for name, shard in self.shards(kind):
                if self._stage == 0:
                    shard = _part(shard.values, rank, world_size)
                found[f"{kind}.{name}"] = _copy(shard)
        for name, tensor in self._constants():
            if rank == 0 or _is_partitioned(tensor):
                found[f"{WEIGHTS}.{name}"] = _copy(_held(tensor))
        return {key: shard for key, shard in found.items() if shard.values.numel()}

    def constant_shapes(self) -> dict[str, list[int]]:
        """Shapes of the model's tensors that are not trained: buffers and frozen parameters."""
        return {name: list(_shape(tensor)) for name, tensor in self._constants()}

    @contextmanager
    def average(self) -> Iterator[None]:
        """While entered, the model has the moving average as its weights; all ranks enter it.

        The shards of average and weights change places, a tensor at a time.
        """
        self._exchange()
        self._refresh()
        try:
            yield
        except BaseException:
            self._exchange()  # and nothing that needs ranks which may not be here
            raise
        self._exchange()
        self._refresh()

    def steps(self) -> int:
        """Number of updates that the optimizer has applied."""
        return int(self._optimizer.state[self._optimized()[0]]["step"])

    def loss_scaler(self) -> LossScaler | None:
        """State of the dynamic loss scale; None unless in fp16."""
        scaler = self._scaler()
        if scaler is None:
            return None
        return LossScaler(**{field.name: getattr(scaler, field.name) for field in SCALER})

    def set_loss_scaler(self, saved: LossScaler | None) -> None:
        """Restore a dynamic loss scale, if both runs have one."""
        scaler = self._scaler()
        if scaler is not None and saved is not None:
            for field in SCALER:
                setattr(scaler, field.name, getattr(saved, field.name))

    def loss_scale_can_drop(self) -> bool:
        """Whether the dynamic loss scaler handles an overflow by itself."""
        scaler = self._scaler()
        return scaler is not None and scaler.cur_scale > scaler.min_scale

    def _scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _trained(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                yield name, parameter

    def _constants(self) -> Iterator[tuple[str, Tensor]]:
        trained = {name for name, _ in self._trained()}
        for name, tensor in self._engine.module.state_dict(keep_vars=True).items():
            if name not in trained:
                yield name, tensor

    def _shard(self, parameter: Any, kind: str) -> Shard | None:
        if self._stage == 0:
            master = self._masters.get(parameter, parameter)
            tensor = master if kind == WEIGHTS else self._optimizer.state[master][kind]
            return Shard(0, tensor.detach().view(-1))
        if self._stage == 3:
            return _clipped(parameter, self._partition(parameter, kind))
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it is on other ranks
            return None
        fragment = mapping.get_hp_fragment(None if kind == WEIGHTS else kind)
        return Shard(mapping.lp_fragment_address.start, fragment.detach())

    def _partition(self, parameter: Any, kind: str = WEIGHTS) -> Tensor:
        """This rank's fp32 partition at stage 3, with padding."""
        found, _ = self._engine.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=None if kind == WEIGHTS else kind
        )
        return found.detach()

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """This rank's weights and their averages, by name; none without a moving average."""
        if EMA in self.kinds:
            pairs = zip(self.shards(WEIGHTS), self.shards(EMA), strict=True)
            for (name, weights), (_, average) in pairs:
                yield name, weights.values, average.values

    @torch.no_grad()
    def _exchange(self) -> None:
        for _, weights, average in self._pairs():
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Set the model's parameters to the master weights, as an update does at its end."""
        zero = self._engine.optimizer
        if self._stage == 0:
            for parameter, master in self._masters.items():
                parameter.copy_(master)
        elif self._stage < 3:
            zero.update_lp_params()
        else:
            zero.parameter_offload.partition_all_parameters()
            for _, parameter in self._trained():
                parameter.ds_tensor.copy_(self._partition(parameter))
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def _optimized(self) -> list[Tensor]:
        """The tensors that this rank's optimizer updates: parameters, master weights or shards."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]


@torch.no_grad()
def load_tensors(model: nn.Module, source: Source, prefix: str = "") -> None:
    """Set what this rank holds of the tensors of a model without an optimizer.

    Args:
        prefix: before the names of the model's state dict in the source's keys.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        start, values = _held(tensor)
        _fill(values, source, prefix + name, start)


def _fill(values: Tensor, source: Source, key: str, start: int) -> None:
    """Copy a range of a tensor from a source, if that has it.

    Raises:
        CheckpointError: it has other numbers: copied, they would be rounded.
    """
    if key in source:
        found = source.read(key, start, values.numel())
        both_float = found.is_floating_point() and values.is_floating_point()
        if found.dtype != values.dtype and not both_float:
            raise CheckpointError(key, str(values.dtype), found.dtype)
        values.copy_(found)


def _is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_tensor")


def _shape(tensor: Any) -> torch.Size:
    return tensor.ds_shape if _is_partitioned(tensor) else tensor.shape


def _held(tensor: Any) -> Shard:
    """What this rank holds of a buffer or a frozen parameter."""
    if _is_partitioned(tensor):
        return _clipped(tensor, tensor.ds_tensor.detach())
    return Shard(0, tensor.detach().view(-1))


def _clipped(parameter: Any, partition: Tensor) -> Shard:
    """The shard in a partition of stage 3, of which the last may end with padding."""
    size, rank = partition.numel(), dist.get_rank(parameter.ds_process_group)
    first = min(size * rank, parameter.ds_numel)
    return Shard(first, partition[: parameter.ds_numel - first])


def _part(flat: Tensor, part: int, parts: int) -> Shard:
    """One of equal parts of a flattened tensor."""
    first, end = (flat.numel() * n // parts for n in (part, part + 1))
    return Shard(first, flat[first:end])


def _copy(shard: Shard) -> Shard:
    dtype = torch.float32 if shard.values.is_floating_point() else shard.values.dtype
    return Shard(shard.start, shard.values.to("cpu", dtype, copy=True))


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> fp32 master weight, for half precision at stage 0.

    DeepSpeed 0.19.8 names them for the other stages only.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {p: m for halves, masters in groups for p, m in zip(halves, masters, strict=True)}
