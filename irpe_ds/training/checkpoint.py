"""Checkpoints: DeepSpeed's state to resume from, and plain weights for everybody else.

run/checkpoints/update-00000720/
    checkpoint.json        written last: a folder without it is not a checkpoint
    weights.safetensors    the whole model in fp32, for timm, evaluation and export
    *.pt                   DeepSpeed's model and optimizer states
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.training.distributed import Ranks
from irpe_ds.training.plan import Plan

FOLDER, MANIFEST, WEIGHTS = "checkpoints", "checkpoint.json", "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds, and what a run must share with it to resume."""

    update: int
    """Updates done."""
    world_size: int
    zero_stage: int
    precision: str
    global_batch: int
    accumulation: int
    updates_per_epoch: int
    """With `update` the position in the data."""
    seed: int
    shapes: dict[str, list[int]]
    """Shape of every parameter of the model, by name."""

    def at(self, update: int) -> "Manifest":
        """The same run, further on."""
        return replace(self, update=update)


def describe(
    config: RunConfig, settings: dict[str, Any], plan: Plan, model: nn.Module, world_size: int
) -> Manifest:
    """The manifest of this run before its first update."""
    return Manifest(
        update=0,
        world_size=world_size,
        zero_stage=settings["zero_optimization"]["stage"],
        precision=config.train.precision,
        global_batch=config.train.global_batch,
        accumulation=config.train.accumulation,
        updates_per_epoch=plan.updates_per_epoch,
        seed=config.seed,
        shapes={name: list(p.shape) for name, p in model.named_parameters()},
    )


def save(engine: Any, folder: Path, manifest: Manifest, ranks: Ranks, keep: int) -> Path:
    """Write a checkpoint, visible only when it is whole, and remove all but the newest `keep`.

    All ranks call it.
    """
    path = folder / f"update-{manifest.update:08d}"
    engine.save_checkpoint(str(folder), tag=path.name, save_latest=False)
    state = full_state_dict(engine)
    if ranks.is_first:
        save_file(state, path / WEIGHTS)
    dist.barrier()
    if ranks.is_first:
        partial = path / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(asdict(manifest)))
        os.replace(partial, path / MANIFEST)
        for old in complete(folder)[:-keep]:
            (old / MANIFEST).unlink()  # first, so that a kill leaves no checkpoint that looks whole
            shutil.rmtree(old)
    dist.barrier()  # no rank looks for checkpoints before this one is there
    return path


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"update-*/{MANIFEST}"))


def check(path: Path, present: Manifest) -> int:
    """The updates that a checkpoint has done, if the run described by `present` can go on from it.

    Raises:
        ConfigError: it belongs to another model, or to data, ranks, a stage or a precision with
            which its training would not go on as it began.
    """
    saved = _read(path)
    if saved.shapes != present.shapes:
        names = saved.shapes.keys() | present.shapes.keys()
        name = min(n for n in names if saved.shapes.get(n) != present.shapes.get(n))
        there, here = (manifest.shapes.get(name, "absent") for manifest in (saved, present))
        got = f"another's: {name} of shape {there}, which is {here} here"
        raise ConfigError(path, "the parameters of this model", got)
    for key, value in asdict(present).items():
        if key != "update" and getattr(saved, key) != value:
            raise ConfigError(path, f"{key} {value}, as in this run", getattr(saved, key))
    return saved.update


def resume(engine: Any, path: Path) -> int:
    """Load a checkpoint accepted by `check` into the engine; the updates it has done."""
    engine.load_checkpoint(str(path.parent), tag=path.name)
    return _read(path).update


def _read(path: Path) -> Manifest:
    try:
        return Manifest(**json.loads((path / MANIFEST).read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(path / MANIFEST, "a manifest of this version", error) from None


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """The model's whole state in fp32 on the CPU, from the master weights of any ZeRO stage.

    All ranks call it; parameters are gathered one by one.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _unpartitioned_masters(engine.optimizer)
    state = {name: _whole(tensor) for name, tensor in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        master = masters.get(parameter)
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        state[name] = _whole(parameter if master is None else master)
    return state


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in fp32 if it is of floating point."""
    copy = tensor.detach().to("cpu", copy=True).contiguous()
    return copy.float() if copy.is_floating_point() else copy


def _unpartitioned_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> fp32 master in half precision without ZeRO, which DeepSpeed has no call for."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: m for halves, masters in groups for p, m in zip(halves, masters, strict=True)}
