"""A run from its configuration: check everything, build, train, keep the record."""

import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from irpe_ds.cluster.consistency import check_consistency, software
from irpe_ds.cluster.heartbeat import Heartbeat
from irpe_ds.cluster.process_group import device_type, init_process_group, launched, set_environment
from irpe_ds.cluster.signals import StopSignals, lasting
from irpe_ds.config import RunConfig
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model
from irpe_ds.ops.dispatch import ResolvedImpl
from irpe_ds.runlog import RunLog
from irpe_ds.training import checkpoint
from irpe_ds.training.deepspeed_config import deepspeed_config
from irpe_ds.training.evaluation import check_data
from irpe_ds.training.loss import Loss, build_loss
from irpe_ds.training.run_length import RunLength, run_length
from irpe_ds.training.run_metadata import attention_op, inputs, write_run_metadata
from irpe_ds.training.start import FolderLock, check_folder, find_start, first_model
from irpe_ds.training.trainer import Trainer


class Ready(NamedTuple):
    """What every rank makes by itself, and finds mistakes by."""

    data: dict[str, DatasetInfo]
    plan: RunLength
    model: nn.Module
    loss: Loss
    op: ResolvedImpl


def train(
    config: RunConfig, resume: str = "never", work: Callable[[Trainer, RunLog], bool] = Trainer.fit
) -> bool:
    """Train a run to its end, or until a signal asks it to stop; whether it is at its end.

    Args:
        resume: `never`, `auto` (go on from the newest undamaged checkpoint of the run folder, or
            start if there is none), or the folder of one checkpoint.
        work: what to do with the trainer once all is ready.

    Raises:
        ConfigError: a mistake in the configuration or the data.
        TrainingError: gradients are not finite any more.
    """
    set_environment()
    _, world_size = launched()
    settings = deepspeed_config(config, world_size)
    ranks = init_process_group(config.train.join_seconds)
    check_consistency(ranks, software(config))
    with (
        redirect_stdout(lasting(sys.stdout)),
        redirect_stderr(lasting(sys.stderr)),
        StopSignals() as stop,
        Heartbeat(ranks),
    ):
        ready = ranks.run_checked(partial(prepare, config, resume))
        plan, model, op = ready.plan, ready.model, ready.op
        check_consistency(ranks, inputs(ready.data, op))
        manifest = checkpoint.describe(config, settings, plan, model, world_size, op._asdict())
        start = ranks.on_rank0(partial(find_start, config, resume, manifest))
        if start.path is not None and ranks.any_rank(not start.path.exists()):
            expected = "a run folder that all nodes share"
            raise ConfigError(config.folder, expected, f"no {start.path} on one of them")
        saved = start.saved
        if saved.update > plan.last_update or (saved.update == plan.last_update and saved.scores):
            if ranks.is_main:
                done = f"{config.folder} is trained already, {saved.update} updates"
                print(f"{done}; name=... starts another")
            return True
        check_folder(config)
        with FolderLock(config.folder, ranks):
            trainer = Trainer(
                config, plan, manifest, start, model, ready.loss, settings, ranks, stop
            )
            with RunLog(
                config.folder,
                active=ranks.is_main,
                name=config.name,
                config=config.model_dump(mode="json"),
                wandb=config.log.wandb.model_dump(),
                tensorboard=config.log.tensorboard,
                resume_update=None if resume == "never" else saved.update,
                again=() if saved.scores else ("eval",),
            ) as log:
                if ranks.is_main:
                    log.note(write_run_metadata(config, settings, ranks, op))
                for text in start.notes:
                    log.note(text)
                return work(trainer, log)


def prepare(config: RunConfig, resume: str) -> Ready:
    """Check the data, build the model and, where they are not built, the operators."""
    data = check_data(config)
    plan = run_length(config, data["train"].num_samples)
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.tf32
    torch.manual_seed(config.seed)
    model = build_model(first_model(config, resume))
    loss = build_loss(config)
    loss.prepare(model)
    return Ready(data, plan, model, loss, attention_op(config, model, device_type()))


def input_facts(config: RunConfig) -> dict[str, str]:
    """What `prepare` finds on this host that has to be the same on all."""
    ready = prepare(config, "never")
    return inputs(ready.data, ready.op)
