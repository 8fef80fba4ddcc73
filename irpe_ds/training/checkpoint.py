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
from irpe_ds.training.deepspeed_config import zero_stage
from irpe_ds.training.distributed import Ranks

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
    shapes: dict[str, list[int]]
    """Shape of every parameter of the model, by name."""

    def at(self, update: int) -> "Manifest":
        """The same run, further on."""
        return replace(self, update=update)


def describe(config: RunConfig, model: nn.Module, world_size: int) -> Manifest:
    """The manifest of this run before its first update."""
    return Manifest(
        update=0,
        world_size=world_size,
        zero_stage=zero_stage(config),
        precision=config.train.precision,
        global_batch=config.train.global_batch,
        shapes={name: list(p.shape) for name, p in model.named_parameters()},
    )


def save(engine: Any, folder: Path, manifest: Manifest, ranks: Ranks, keep: int) -> Path:
    """Write a checkpoint, visible only when it is whole, and remove all but the newest `keep`.

    All ranks call it. A checkpoint of the same update that is there already is left alone.
    """
    path = folder / f"update-{manifest.update:08d}"
    if (path / MANIFEST).exists():
        return path
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
            shutil.rmtree(old)
    return path


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"update-*/{MANIFEST}"))


def check(path: Path, present: Manifest) -> int:
    """The updates that a checkpoint has done, if the run described by `present` can go on from it.

    Raises:
        ConfigError: it belongs to another model, or to ranks, a stage or a precision that cannot
            take it over.
    """
    saved = _read(path)
    if saved.shapes != present.shapes:
        names = saved.shapes.keys() | present.shapes.keys()
        name = min(n for n in names if saved.shapes.get(n) != present.shapes.get(n))
        expected = f"{name} of shape {present.shapes.get(name)}, as in this model"
        raise ConfigError(path, expected, saved.shapes.get(name))
    for field in ("world_size", "zero_stage", "precision", "global_batch"):
        if getattr(saved, field) != getattr(present, field):
            expected = f"{field} {getattr(present, field)}, as in this run"
            raise ConfigError(path, expected, getattr(saved, field))
    return saved.update


def resume(engine: Any, path: Path) -> int:
    """Load a checkpoint that `check` let pass into the engine; the updates it has done."""
    engine.load_checkpoint(str(path.parent), tag=path.name)
    return _read(path).update


def _read(path: Path) -> Manifest:
    return Manifest(**json.loads((path / MANIFEST).read_text()))


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """The model's whole state in fp32 on the CPU, from the master weights of any ZeRO stage.

    All ranks call it; parameters are gathered one by one.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _unpartitioned_masters(engine.optimizer)
    state = {name: b.detach().cpu().clone() for name, b in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        master = masters.get(parameter)
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        whole = parameter if master is None else master
        state[name] = whole.detach().float().cpu().contiguous()
    return state


def _unpartitioned_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> fp32 master in half precision without ZeRO, which DeepSpeed has no call for."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: m for halves, masters in groups for p, m in zip(halves, masters, strict=True)}
