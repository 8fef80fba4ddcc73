"""From a model without values to DeepSpeed's engine: whole parameters, or partitions of ZeRO-3."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from irpe_ds.checkpoint.reader import WEIGHTS
from irpe_ds.cluster.process_group import Ranks, disable_shm_allreduce
from irpe_ds.config import RunConfig
from irpe_ds.models.deferred import Initial, like, replace_parameters
from irpe_ds.training.gradient_sums import GradientSums, build_gradient_sums
from irpe_ds.training.optim import build_optimizer, parameter_groups
from irpe_ds.training.precision import MODEL


def build_engine(
    model: nn.Module, config: RunConfig, ds_config: dict[str, Any], device: torch.device
) -> tuple[Any, GradientSums | None]:
    """The engine of a run, with zeros for `EngineState.load` to set, and its sums of gradients.

    Args:
        model: built by `build_deferred`; changed in place.
    """
    import deepspeed

    from irpe_ds.ops.build.builder import guard_deepspeed_builds

    disable_shm_allreduce()
    guard_deepspeed_builds()
    groups = parameter_groups(model, config)  # by shape, which partitions do not have
    placed = place_parameters(model, ds_config, MODEL[config.train.precision], device)
    for group in groups:
        group["params"] = [placed[parameter] for parameter in group["params"]]
    sums = build_gradient_sums(model, config, ds_config)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(groups, config, ds_config), config=ds_config
    )
    return engine, sums


def build_evaluation_model(model: nn.Module, section: Mapping[str, Any], ranks: Ranks) -> nn.Module:
    """A model for forward passes in fp32, with zeros for `load_tensors` to set.

    Args:
        model: built by `build_deferred`; changed in place.
        section: `zero_optimization`. At stage 3 several ranks share the parameters.
    """
    is_partitioned = section["stage"] == 3 and ranks.world_size > 1
    zero = {**section, "stage": 3 if is_partitioned else 0, "offload_optimizer": None}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    disable_shm_allreduce()
    place_parameters(model, ds_config, torch.float32, ranks.device)
    if not is_partitioned:
        return model
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    return engine


def place_parameters(
    model: nn.Module, ds_config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[nn.Parameter, nn.Parameter]:
    """Give the parameters memory and the value zero, for `EngineState.load` to set.

    At stage 3 each is partitioned as soon as it is there: no moment has two whole ones.

    Args:
        model: built by `build_deferred`; changed in place.
        dtype: of the parameters at stage 3. Before, DeepSpeed converts them itself.

    Returns:
        The new parameters, by those in whose place they are.
    """
    placed: dict[nn.Parameter, nn.Parameter] = {}
    is_partitioned = ds_config["zero_optimization"]["stage"] == 3
    if is_partitioned:
        import deepspeed

        from irpe_ds.ops.build.builder import guard_deepspeed_builds

        guard_deepspeed_builds()
        deepspeed.init_distributed(auto_mpi_discovery=False)  # for the number of ranks
        # A module, if without parameters, so that DeepSpeed 0.19.8 installs its linear function,
        # without which autograd keeps every gathered weight until the backward pass.
        init = deepspeed.zero.Init(nn.Identity(), config_dict_or_path=ds_config, dtype=dtype)

    def place(_: str, parameter: nn.Parameter) -> nn.Parameter:
        own = dtype if is_partitioned else parameter.dtype
        placed[parameter] = made = like(
            parameter, torch.zeros(parameter.shape, dtype=own, device=device)
        )
        if is_partitioned:
            init._convert_to_zero_parameters([made])
        return made

    replace_parameters(model, place)
    model.to(device)  # its buffers
    return placed


class FirstValues:
    """A model's first values as the `Source` of an engine's state, drawn a parameter at a time.

    Args:
        model, initial: of `build_deferred`.
        device: where to draw.
    """

    def __init__(self, model: nn.Module, initial: Initial, device: torch.device) -> None:
        self._initial, self._device = initial, device
        first: dict[nn.Parameter, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        self._names = {name: first.setdefault(parameter, name) for name, parameter in named}

    def __contains__(self, key: str) -> bool:
        kind, _, name = key.partition(".")
        return kind == WEIGHTS and name in self._names

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Elements of the flattened parameter weights.NAME; (count,), on the device."""
        value = self._initial.read(self._names[key.partition(".")[2]], self._device)
        return value.flatten()[start : start + count]
