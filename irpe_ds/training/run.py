"""A run from its configuration: check everything, build, train, keep the record."""

import tempfile
from pathlib import Path

import torch

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model
from irpe_ds.runlog import METRICS, RunLog
from irpe_ds.training import checkpoint
from irpe_ds.training.deepspeed_config import deepspeed_config
from irpe_ds.training.distributed import device_type, join, launched, set_environment
from irpe_ds.training.evaluation import check_data
from irpe_ds.training.plan import make_plan
from irpe_ds.training.record import attention_op, write_record
from irpe_ds.training.trainer import Trainer


def train(config: RunConfig, resume: str = "never") -> None:
    """Train a run to its end.

    Args:
        resume: `never`, `auto` (go on from the newest checkpoint of the run folder, or start if
            there is none), or the folder of one checkpoint.

    Raises:
        ConfigError: a mistake in the configuration or the data; found on every rank by itself,
            before the ranks wait for each other.
    """
    set_environment()
    rank, world_size = launched()
    settings = deepspeed_config(config, world_size)
    plan = make_plan(config, check_data(config).num_samples)
    start = find_start(config, resume)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    manifest = checkpoint.describe(config, settings, plan, model, world_size)
    update = checkpoint.check(start, manifest) if start is not None else 0
    if update >= plan.last_update:
        if rank == 0:
            print(f"{config.folder} is trained already, {update} updates; name=... starts another")
        return
    check_folder(config)
    op = attention_op(config, model, device_type())

    ranks = join()
    first, last = ranks.range(update)
    if first != last:
        expected = "a run folder that all nodes share"
        raise ConfigError(config.folder, expected, f"checkpoints of updates {first} and {last}")
    trainer = Trainer(config, plan, manifest, model, settings, ranks)
    if start is not None:
        trainer.resume(start)
    with RunLog(
        config.folder,
        active=ranks.is_first,
        name=config.name,
        config=config.model_dump(mode="json"),
        wandb=config.log.wandb.model_dump(),
        tensorboard=config.log.tensorboard,
        resume_update=None if resume == "never" else trainer.update,
    ) as log:
        if ranks.is_first:
            log.note(write_record(config, settings, ranks, op))
        if start is not None:
            log.note(f"going on from {start}")
        trainer.fit(log)


def find_start(config: RunConfig, resume: str) -> Path | None:
    """The checkpoint to go on from; None to start anew.

    Raises:
        ConfigError: no such checkpoint, or a run is there already that would be overwritten.
    """
    own = checkpoint.complete(config.folder / checkpoint.FOLDER)
    if resume == "auto":
        return own[-1] if own else None
    there = (config.folder / METRICS).exists()
    if resume == "never":
        if there:
            expected = "a new run: --resume auto goes on with this one, name=... starts another"
            raise ConfigError(config.folder, expected, "the folder of a run")
        return None
    path = Path(resume)
    if not (path / checkpoint.MANIFEST).exists():
        raise ConfigError("--resume", "auto or the folder of a checkpoint", resume)
    if there and (not own or path.resolve() != own[-1].resolve()):
        expected = "its newest checkpoint, or name=... to start another run from an older one"
        raise ConfigError(config.folder, expected, resume)
    return path


def check_folder(config: RunConfig) -> None:
    """Make the run folder; raise ConfigError where nothing can be written."""
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.folder):
            pass
    except OSError as error:
        got = f"{config.folder}: {error.strerror}"
        raise ConfigError("output", "a folder that can be written", got) from None
