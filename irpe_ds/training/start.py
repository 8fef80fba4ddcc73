"""Where a run starts, from scratch or from a checkpoint, and how long it is."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import timm
import torch
from torch import nn

from irpe_ds.checkpoint import reader
from irpe_ds.checkpoint.reader import CheckpointManifest
from irpe_ds.cluster.process_group import Ranks
from irpe_ds.config import ModelConfig, RunConfig
from irpe_ds.errors import CheckpointError, ConfigError
from irpe_ds.files import lock_file
from irpe_ds.models.build import check_positions
from irpe_ds.models.vision_transformer import last_block_is_inert
from irpe_ds.runlog import METRICS
from irpe_ds.training.optim import peak_lr

LOCK = ".lock"
"""File of the run folder that is locked, and held open, while a run writes there."""


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """Length of a run, in updates."""

    num_samples: int
    """Images in the training set."""
    updates_per_epoch: int
    """Full global batches in the training set."""
    last_update: int
    """The update after which training ends."""


def run_length(config: RunConfig, num_samples: int) -> RunLength:
    """The length of this run on `num_samples` training images.

    Raises:
        ConfigError: they do not fill one global batch.
    """
    train = config.train
    updates_per_epoch = num_samples // train.global_batch
    if not updates_per_epoch:
        expected = f"at most {num_samples}, the images in {config.data.train}"
        raise ConfigError("train.global_batch", expected, train.global_batch)
    last_update = train.epochs * updates_per_epoch
    return RunLength(
        num_samples=num_samples,
        updates_per_epoch=updates_per_epoch,
        last_update=min(last_update, train.max_updates or last_update),
    )


def cautions(config: RunConfig, length: RunLength) -> list[str]:
    """What a careful colleague would say of settings that are no mistake, for the log."""
    train, updates, found = config.train, length.last_update, []
    share = 0.0 if train.ema_warmup else (train.ema_decay or 0) ** updates
    if share > 0.1:
        found.append(
            f"train.ema_decay={train.ema_decay:g}: after this run's {updates} updates the average "
            f"is still {share:.0%} first weights; train.ema_warmup=true makes it forget them, "
            "train.ema_decay=null keeps no average"
        )
    emulated = not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported()
    if train.precision == "bf16" and emulated:
        found.append("bf16 is emulated on this CPU: train.precision=fp32 is several times faster")
    optim, peak = config.optim, peak_lr(config)
    formula = f"the peak learning rate {peak:g} (optim.lr * train.global_batch / optim.lr_batch)"
    if optim.min_lr > peak:
        found.append(f"optim.min_lr={optim.min_lr:g} is above {formula}: the rate grows to the end")
    if optim.warmup_lr > peak and optim.warmup_epochs:
        found.append(f"optim.warmup_lr={optim.warmup_lr:g} is above {formula}: warm-up lowers it")
    if config.model.num_classes == 1:
        found.append("model.num_classes=1: every image is of the class, and nothing is learned")
    if config.data.pipeline == "ffcv":
        from irpe_ds.data.pipelines.decoding import WHY_WHOLE  # compiles on import

        found += [f"images are decoded whole, which is slower: {WHY_WHOLE}"] if WHY_WHOLE else []
    found += _other_normalization(config)
    return [f"caution: {text}" for text in found]


def inert_tables(config: ModelConfig, model: nn.Module) -> list[str]:
    """A line for the log where the tables of the last block learn next to nothing."""
    if not last_block_is_inert(model):
        return []
    text = "the last block's tables are inert: only the class token is read there, and for it all "
    text += "patches are in one bucket"
    return [f"{text} (model.rpe.last_block=false leaves them out)" if config.rpe else text]


def _other_normalization(config: RunConfig) -> list[str]:
    """Cautions where loaded weights are of a model that timm knows with other pixel values."""
    model, distill, data = config.model, config.distill, config.data
    loaded = {}
    if model.weights is not None or model.pretrained or model.options.get("pretrained"):
        loaded["model.name"] = model.name
    if distill.kind != "none":
        loaded["distill.teacher"] = distill.teacher
    found = []
    for key, name in loaded.items():
        theirs = timm.models.get_pretrained_cfg(name)
        for what, ours in (("mean", data.mean), ("std", data.std)):
            usual = getattr(theirs, what, None)
            if usual and max(abs(a - b) for a, b in zip(ours, usual, strict=True)) > 0.01:
                shown = [round(value, 3) for value in usual]
                found.append(f"data.{what}={[*ours]}, but weights of {key}={name} expect {shown}")
    return found


def initial_manifest(
    config: RunConfig,
    ds_config: Mapping[str, Any],
    length: RunLength,
    model: nn.Module,
    world_size: int,
    op: Mapping[str, str],
) -> CheckpointManifest:
    """The checkpoint manifest of this run before its first update."""
    return CheckpointManifest(
        updates_per_epoch=length.updates_per_epoch,
        global_batch=config.train.global_batch,
        num_samples=length.num_samples,
        seed=config.seed,
        optimizer=config.optim.name,
        shapes={name: list(p.shape) for name, p in model.named_parameters()},
        world_size=world_size,
        zero_stage=ds_config["zero_optimization"]["stage"],
        op=dict(op),
        config=config.model_dump(mode="json"),
    )


class Start(NamedTuple):
    """Where a run starts."""

    path: Path | None
    """The checkpoint to resume from; None to start from scratch."""
    saved: CheckpointManifest
    """Its manifest, or that of the run before its first update."""
    notes: list[str]
    """Messages about it for the log."""


def find_start(config: RunConfig, resume: str, present: CheckpointManifest, ranks: Ranks) -> Start:
    """Find out where to start; all ranks call it, and share the reading of checkpoints.

    Args:
        resume: `never`, `auto` or the folder of a checkpoint, as in `run.train`.
        present: manifest of this run before its first update.

    Raises:
        CheckpointError: the checkpoint does not exist, is damaged or is another model's, or an
            existing run would be overwritten.
    """
    exists = ranks.on_rank0(partial(_check_resume, config, resume))
    folder = config.folder / reader.FOLDER
    if resume == "never":
        return Start(None, present, [])
    if resume == "auto" or _is_in(folder, resume):
        path, damaged = reader.newest_undamaged(folder, ranks)
        if resume != "auto" and (path is None or Path(resume).resolve() != path.resolve()):
            expected = f"its newest undamaged checkpoint ({path}), or name=... to start another run"
            raise CheckpointError(config.folder, expected, resume)
    else:
        path, damaged = Path(resume), []
        if damage := reader.damage_on_any(path, ranks):
            raise CheckpointError(f"--resume {path}: damaged checkpoint: {damage}")
    notes = [f"skipped a damaged checkpoint: {text}" for text in damaged]
    if path is None:
        return Start(None, present, ["no checkpoint yet: starting from scratch"] if exists else [])
    saved = ranks.on_rank0(partial(reader.check_compatible, path, present))
    ranks.on_rank0(partial(check_positions, path, saved, config.model))
    changes = "; ".join(reader.changes(saved, present))
    notes.append(f"resuming from {path}" + (f" with {changes}" if changes else ""))
    return Start(path, saved, notes)


def _check_resume(config: RunConfig, resume: str) -> bool:
    """Whether the run exists; raises CheckpointError if `resume` does not fit that."""
    folder = config.folder / reader.FOLDER
    exists = (config.folder / METRICS).exists()
    if resume == "never":
        if exists:
            raise CheckpointError(
                f"{config.folder} holds a run already: continue it with --resume auto, or start "
                "another with name=..."
            )
    elif resume != "auto" and not _is_in(folder, resume):
        if not Path(resume).is_dir():
            raise CheckpointError("--resume", "auto or the folder of a checkpoint", resume)
        if reader.numbered(folder):
            expected = "--resume auto, or name=... to start another run from a checkpoint"
            raise CheckpointError(config.folder, expected, resume)
    return exists


def _is_in(folder: Path, resume: str) -> bool:
    return Path(resume).resolve().parent == folder.resolve()


class FolderLock:
    """While entered, no other run writes to the run folder; the kernel unlocks it on any exit.

    Raises:
        CheckpointError: on all ranks, if another run does.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks

    def __enter__(self) -> None:
        self._ranks.on_rank0(self._acquire)

    def __exit__(self, *_: object) -> None:
        if self._ranks.is_main:
            self._file.close()

    def _acquire(self) -> None:
        self._file = lock(self._folder)


def lock(folder: Path) -> TextIO:
    """Lock a run folder until the returned file is closed.

    Raises:
        CheckpointError: another process has locked it, or its file system does not support locks.
    """
    try:
        return lock_file(folder / LOCK)
    except BlockingIOError:
        message = f"{folder}: run folder is locked by another running process"
        raise CheckpointError(message) from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot lock run folder (flock): {error}") from None


def model_to_build(config: RunConfig, resume: str) -> ModelConfig:
    """The model's configuration, without `weights` if a checkpoint's will replace them."""
    own = reader.numbered(config.folder / reader.FOLDER)
    from_scratch = resume == "never" or (resume == "auto" and not own)
    return config.model if from_scratch else config.model.without_weights()


def check_folder(config: RunConfig) -> None:
    """Create the run folder, and check that files can be written to it.

    Raises:
        CheckpointError: they cannot.
    """
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.folder):
            pass
    except OSError as error:
        message = f"output: cannot write to {config.folder}: {error.strerror}"
        raise CheckpointError(message) from None
