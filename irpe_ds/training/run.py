"""A run from its configuration: check everything, build, train, record what ran where."""

import json
import os
import platform
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from irpe_ds.checkpoint.manifest import CheckpointManifest
from irpe_ds.cluster.consistency import check_consistency, software_facts
from irpe_ds.cluster.heartbeat import Heartbeat
from irpe_ds.cluster.preemption import PreemptionSync
from irpe_ds.cluster.process_group import (
    Ranks,
    device_type,
    init_process_group,
    rank_and_world_size,
    set_environment,
)
from irpe_ds.cluster.rendezvous import INTERFACE
from irpe_ds.cluster.signals import StopSignals, broken_pipe_safe
from irpe_ds.cluster.waiting import Waiting
from irpe_ds.config import RunConfig
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.errors import ClusterError, ConfigError, ExitCode, UserError
from irpe_ds.files import replace_file
from irpe_ds.models.attention import first_layer
from irpe_ds.models.build import build_deferred
from irpe_ds.models.deferred import Initial
from irpe_ds.ops.dispatch import FallbackWarning, ResolvedImpl, resolve_impl
from irpe_ds.provenance import commit, package_versions
from irpe_ds.runlog import RunLog, writing
from irpe_ds.training.datasets import check_data, check_names, names_of, resolve, stage, unconverted
from irpe_ds.training.deepspeed_config import deepspeed_config, sums_in_fp32
from irpe_ds.training.loss import Loss, build_loss
from irpe_ds.training.precision import PRODUCTS
from irpe_ds.training.start import (
    FolderLock,
    RunLength,
    cautions,
    check_folder,
    find_start,
    inert_tables,
    initial_manifest,
    model_to_build,
    run_length,
)
from irpe_ds.training.trainer import Trainer


class Prepared(NamedTuple):
    """What every rank builds by itself before training, which finds most mistakes."""

    data: dict[str, DatasetInfo]
    length: RunLength
    model: nn.Module
    """Its parameters are on the meta device."""
    initial: Initial
    """Their first values."""
    loss: Loss
    op: ResolvedImpl

    def facts(self) -> dict[str, str]:
        """What has to be the same on all ranks: the data sets and the attention op."""
        found = {}
        for part, info in self.data.items():
            images = f"{info.num_samples} images"
            found[f"data.{part}"] = info.manifest.sha256[:12] if info.manifest else images
        return {**found, "the attention op": self.op.name}


def train(
    config: RunConfig, resume: str = "never", work: Callable[[Trainer, RunLog], bool] = Trainer.fit
) -> bool:
    """Train a run to its end, or until a signal asks it to stop; whether it reached its end.

    Args:
        resume: `never`, `auto` (continue from the newest undamaged checkpoint in the run folder, or
            start if there is none), or the folder of a checkpoint.
        work: what to do with the trainer once everything is ready.

    Raises:
        UserError: a mistake in the configuration, the data, the checkpoint or the cluster.
        TrainingError: too many updates in a row with gradients that are not finite.
    """
    set_environment()
    _, world_size = rank_and_world_size()
    ds_config = deepspeed_config(config, world_size)
    ranks = init_process_group(config.train.join_seconds)
    check_consistency(ranks, software_facts(config))
    with (
        redirect_stdout(broken_pipe_safe(sys.stdout)),
        redirect_stderr(broken_pipe_safe(sys.stderr)),
        StopSignals() as signals,
        Heartbeat(ranks) as heartbeat,
        PreemptionSync(ranks, signals, heartbeat) as preemption,
        Waiting("converting folders of images", ranks.is_main) as waiting,
    ):
        config, notes = ranks.on_rank0_at_length(partial(resolve, config))
        local = config
        if config.data.stage is not None:
            waiting.next("copying the data to data.stage")
            local = ranks.run_at_length(partial(stage, config))
            notes.append(f"data.stage: training images are read from {local.data.train}")
        waiting.next("preparing data, model and attention op")
        prepared = ranks.run_checked(partial(prepare, local, resume))
        length, model, op = prepared.length, prepared.model, prepared.op
        check_consistency(ranks, prepared.facts())
        manifest = initial_manifest(config, ds_config, length, model, world_size, op._asdict())
        waiting.next("reading checkpoints")
        start = find_start(config, resume, manifest, ranks)
        if start.path is not None and ranks.any_rank(not start.path.exists()):
            expected = "a run folder that all nodes share"
            raise ClusterError(config.folder, expected, f"a node without {start.path}")
        if start.path is not None:
            kept = start.path.parents[1]
            ranks.on_rank0(partial(check_names, config, prepared.data["train"], kept))
        left = length.last_update - start.saved.update
        if left < 0 or (left == 0 and start.saved.scores):
            if ranks.is_main:
                print(f"{config.folder}: already trained; name=... starts another run")
            return True
        check_folder(config)
        waiting.next("setting up the engine")
        with FolderLock(config.folder, ranks):
            built = model, prepared.initial, prepared.loss
            watched = ranks, preemption, waiting
            trainer = Trainer(local, length, manifest, start, *built, ds_config, *watched)
            about = {"environment": run_environment(ranks, op), "deepspeed": ds_config}
            with open_log(config, resume, start.saved, ranks, about) as log:
                if ranks.is_main:
                    names = names_of(config, prepared.data["train"])
                    log.note(write_run_metadata(config, about, ranks, model, op, names))
                notes += [*cautions(config, length), *inert_tables(config.model, model)]
                for text in [*notes, *start.notes]:
                    log.note(text)
                with trainer.trace:
                    finished = work(trainer, log)
                waiting.next("closing the log")
                if not finished:
                    log.close(ExitCode.REQUEUE, f"by a signal after update {trainer.update}")
                return finished


def open_log(
    config: RunConfig,
    resume: str,
    saved: CheckpointManifest,
    ranks: Ranks,
    about: Mapping[str, Any],
) -> RunLog:
    """The log of a run that starts from this checkpoint; `about` it W&B is told too."""
    return RunLog(
        config.folder,
        active=ranks.is_main,
        name=config.name,
        config=config.model_dump(mode="json") | {**about},
        wandb=config.log.wandb.model_dump(),
        tensorboard=config.log.tensorboard,
        resume_update=None if resume == "never" else saved.update,
        repeated_kinds=() if saved.scores else ("eval",),
    )


def prepare(config: RunConfig, resume: str) -> Prepared:
    """Check the data, build the model and, if need be, compile the operators.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    data = check_data(config)
    length = run_length(config, data["train"].num_samples)
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.tf32
    model, initial = build_deferred(model_to_build(config, resume), config.seed)
    loss = build_loss(config)
    loss.prepare(model)
    return Prepared(data, length, model, initial, loss, choose_op(config, model, device_type()))


def input_facts(config: RunConfig) -> dict[str, str]:
    """What `prepare` finds on this host that has to be the same on all hosts."""
    return prepare(unconverted(config), "never").facts()


def choose_op(config: RunConfig, model: nn.Module, device_type: str) -> ResolvedImpl:
    """The implementation of the attention op that will run, and why; compiled if need be.

    Raises:
        ConfigError: `model.impl` names one that does not run here.
    """
    layer = first_layer(model)
    if layer is None:
        return ResolvedImpl("timm's own", "the model has no relative position encoding")
    warnings.simplefilter("ignore", FallbackWarning)  # the run's log says it, once
    try:
        key = layer.dispatch_key(device_type, PRODUCTS[config.train.precision])
        return resolve_impl(config.model.impl, key)
    except UserError as error:
        raise ConfigError(f"model.{error.where}", error.expected, error.got) from None


def write_run_metadata(
    config: RunConfig,
    about: Mapping[str, Any],
    ranks: Ranks,
    model: nn.Module,
    op: ResolvedImpl,
    names: dict[str, list[str]],
) -> str:
    """Write config.yaml (resolved), deepspeed.json, environment.json and `names_of` the data.

    Args:
        about: the environment and DeepSpeed's configuration.

    Returns:
        One line for the log: what runs where.

    Raises:
        CheckpointError: a file cannot be written.
    """
    found, ds_config = about["environment"], about["deepspeed"]
    for name, text in (
        ("config.yaml", config.dump()),
        ("deepspeed.json", json.dumps(ds_config, indent=2) + "\n"),
        ("environment.json", json.dumps(found, indent=2) + "\n"),
        *((name, json.dumps(values, indent=0) + "\n") for name, values in names.items()),
    ):
        with writing(config.folder / name):
            replace_file(config.folder / name, text)
    nodes = len(found["hosts"])
    network = f", {nodes} nodes over {found['interface']}" if nodes > 1 else ""
    layer = first_layer(model)
    relative = f" with {layer.describe()}" if layer else ""
    in_fp32 = sums_in_fp32(config) or ds_config.get("communication_data_type") == "fp32"
    sums = ", gradients summed in fp32" if in_fp32 else ""
    return (
        f"{config.folder}: {config.model.name}{relative} in {config.train.precision}{sums}, "
        f"{found['ranks']} ranks on {found['device']}{network}, attention op {op.name} ({op.why})"
    )


def run_environment(ranks: Ranks, op: ResolvedImpl) -> dict[str, Any]:
    """Command, commit, versions, hardware, and which implementation of the op runs and why."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "command": shlex.join(arg for arg in sys.argv if not arg.startswith("--local_rank")),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "CPU",
        "cuda": torch.version.cuda if on_gpu else None,
        "ranks": ranks.world_size,
        "hosts": dict(Counter(ranks.hostnames)),
        "interface": os.environ.get(INTERFACE),
        "attention_op": op._asdict(),
    }
