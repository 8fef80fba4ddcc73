"""Checkpoints: full fp32 tensors, from which any number of ranks and any ZeRO stage can resume.

run/checkpoints/update-00000720/
    checkpoint.json          the manifest, with the size and hash of each file
    weights.safetensors      the full model, for timm, evaluation and export
    ema.safetensors          its moving average, if the run keeps one
    optimizer.safetensors    AdamW's moments: exp_avg.NAME, exp_avg_sq.NAME

A checkpoint is written under a hidden name and renamed once it is on disk. It contains no pickles:
reading one cannot run code.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from irpe_ds.data.beton.manifest import file_sha256
from irpe_ds.errors import CheckpointError, UserError
from irpe_ds.files import fsync, replace_file
from irpe_ds.training.engine_state import EMA, MOMENTS, WEIGHTS, State

FORMAT = 2
FOLDER, MANIFEST = "checkpoints", "checkpoint.json"
OPTIMIZER = "optimizer"


def file_of(kind: str) -> str:
    """Name of the file with tensors of this kind: weights, ema or optimizer."""
    return f"{kind}.safetensors"


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint holds, and what a run must have in common with it to resume from it."""

    format: int = FORMAT
    """Version of this format."""
    update: int = 0
    """Updates done."""
    epoch: int = 0
    """Epochs done."""
    images: int = 0
    """Images of the current epoch that are done, in its order."""
    updates_per_epoch: int
    """Updates in an epoch."""
    global_batch: int
    """Images per update."""
    num_samples: int
    """Images in the training set."""
    seed: int
    """The only random state: what is drawn is a function of seed, update, sample and rank."""
    shapes: dict[str, list[int]]
    """Shape of every parameter of the model, by name."""
    world_size: int
    """Number of ranks that saved it; any number may resume."""
    zero_stage: int
    """ZeRO stage it was trained with; any stage may resume."""
    op: dict[str, str]
    """Implementation of the attention op that trained it, and why it was chosen."""
    config: dict[str, Any]
    """Configuration of the run."""
    steps: int = 0
    """Updates that AdamW has applied: those done, less those skipped."""
    loss_scaler: dict[str, float] | None = None
    """State of the dynamic loss scale; None unless in fp16."""
    meter: dict[str, float] = field(default_factory=dict)
    """Sums of the training metrics since the last log row."""
    scores: dict[str, float] = field(default_factory=dict)
    """Results of the evaluation at this update, if there was one."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and SHA-256 of each file beside this one."""

    def at(self, update: int, **state: Any) -> "CheckpointManifest":
        """The manifest of the same run after `update` updates, with other fields replaced."""
        epoch, done = divmod(update, self.updates_per_epoch)
        images = done * self.global_batch
        return replace(self, update=update, epoch=epoch, images=images, **state)

    @property
    def score(self) -> float:
        """The top-1 accuracy that picks the best checkpoint; -1 without an evaluation."""
        return self.scores.get("ema_top1", self.scores.get("top1", -1.0))


MUST_AGREE = ("num_samples", "updates_per_epoch", "global_batch", "seed")


def save(
    folder: Path,
    manifest: CheckpointManifest,
    state: State,
    *,
    constants: dict[str, Tensor],
    keep: int,
) -> CheckpointManifest:
    """Write a checkpoint, and remove all but the newest `keep` and the best. Only rank 0 calls it.

    Args:
        constants: the model's tensors that are not in the state; weights and ema files have both.

    Returns:
        The manifest as it was written.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are unchanged.
    """
    moments = {f"{kind}.{name}": t for kind in MOMENTS for name, t in state[kind].items()}
    contents = {OPTIMIZER: moments}
    contents |= {kind: constants | state[kind] for kind in (WEIGHTS, EMA) if kind in state}
    path = path_of(folder, manifest.update)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".update-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another process may still read it
        partial = folder / f".{path.name}.partial"
        partial.mkdir(exist_ok=True)
        files = {}
        for kind, tensors in contents.items():
            file = partial / file_of(kind)
            save_file(tensors, file)
            fsync(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        manifest = replace(manifest, files=files)
        _write(partial, manifest)
        fsync(partial)
        _remove(path)  # a damaged one that was skipped
        partial.rename(path)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write checkpoint: {path}: {error}") from None
    _prune(path, keep)
    return manifest


def add_scores(folder: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    """Add the scores in this manifest to its checkpoint on disk."""
    path = path_of(folder, manifest.update)
    try:
        _write(path, manifest)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint: {path}: {error}") from None
    return manifest


def path_of(folder: Path, update: int) -> Path:
    """The folder of an update's checkpoint."""
    return folder / f"update-{update:08d}"


def _write(path: Path, manifest: CheckpointManifest) -> None:
    replace_file(path / MANIFEST, _render(manifest))


def _render(manifest: CheckpointManifest) -> str:
    """JSON with one line per key, the last of which is the hash of the lines before it."""
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in asdict(manifest).items())
    body = "{\n" + ",\n".join(lines)
    return body + f',\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def _prune(newest: Path, keep: int) -> None:
    """Remove all up to `newest` except the last `keep` and the best.

    Later ones are damaged: training resumed from an earlier one, and will overwrite them.
    """
    paths = [path for path in complete(newest.parent) if path.name <= newest.name]
    best = max(paths, key=lambda path: (_score(path), path))
    for old in paths[:-keep]:
        if old != best or _score(old) < 0:
            _remove(old)


def _score(path: Path) -> float:
    try:
        return read_manifest(path).score
    except UserError:
        return -1.0


def _remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that a kill or a reader leaves no half of one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have a manifest, oldest first."""
    return sorted(path.parent for path in folder.glob(f"update-*/{MANIFEST}"))


def weights_of(run: Path, *, best: bool = False, ema: bool = False) -> Path:
    """The weights file of a run's newest checkpoint, or of its best one.

    Args:
        run: the run folder.
        best: by top-1 accuracy, of the moving average if the run keeps one, else of the weights.
        ema: take the moving average instead of the weights.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """
    paths = complete(run / FOLDER)
    if not paths:
        none = "no checkpoint in this run folder" if run.is_dir() else "no such run folder"
        raise CheckpointError(f"{run}: {none}")
    path = max(paths, key=lambda path: (_score(path), path)) if best else paths[-1]
    file = path / file_of(EMA if ema else WEIGHTS)
    if damage := find_damage(path):
        raise CheckpointError(f"{path}: damaged checkpoint: {damage}")
    if not file.exists():
        raise CheckpointError(
            f"{path}: no {file.name}: the run keeps no average (train.ema_decay); leave out --ema"
        )
    return file


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is damaged, or has another format version.
    """
    file = path / MANIFEST
    damaged = CheckpointError(f"{file}: damaged manifest")
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
        values.pop("sha256", None)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise damaged from None
    if values.get("format") != FORMAT:
        raise CheckpointError(file, f"a manifest of format {FORMAT}", values.get("format"))
    try:
        manifest = CheckpointManifest(**values)
    except TypeError:
        raise damaged from None
    if _render(manifest) != text:
        raise damaged
    return manifest


def find_damage(path: Path) -> str | None:
    """What is damaged in a checkpoint, if anything; reads every byte."""
    try:
        files = read_manifest(path).files
    except UserError as error:
        return str(error)
    for name, recorded in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != recorded["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {recorded['bytes']}"
        if file_sha256(file) != recorded["sha256"]:
            return f"{name} differs from what was saved"
    return None


class Newest(NamedTuple):
    """The checkpoint to resume from."""

    path: Path | None
    """None if there is none."""
    damaged: list[str]
    """Newer ones that were skipped, each with what is damaged."""


def newest_undamaged(folder: Path) -> Newest:
    """The newest checkpoint of which every byte is as saved.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    damaged: list[str] = []
    # A folder without a manifest has lost it: it appears together with its files.
    for path in sorted(folder.glob("update-*"), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return Newest(path, damaged)
        damaged.append(f"{path}: {damage}")
    if damaged:
        raise CheckpointError(f"{folder}: every checkpoint is damaged: {'; '.join(damaged)}")
    return Newest(None, [])


def check_compatible(path: Path, present: CheckpointManifest) -> CheckpointManifest:
    """The manifest of a checkpoint, from which the run described by `present` can resume.

    Raises:
        CheckpointError: it is of another model, or of data in another order.
    """
    saved = read_manifest(path)
    if saved.shapes != present.shapes:
        names = saved.shapes.keys() | present.shapes.keys()
        name = min(n for n in names if saved.shapes.get(n) != present.shapes.get(n))
        there, here = (manifest.shapes.get(name, "absent") for manifest in (saved, present))
        raise CheckpointError(
            f"{path}: checkpoint of another model: {name} of shape {there}, here {here}"
        )
    for key in MUST_AGREE:
        here, there = getattr(present, key), getattr(saved, key)
        if here != there:
            raise CheckpointError(path, f"{key} {here}, as in this run", there)
    return saved


def changes(saved: CheckpointManifest, present: CheckpointManifest) -> list[str]:
    """Settings that changed since the checkpoint, as `key: old -> new`."""
    old, new = (
        _flat({"ranks": manifest.world_size, "ZeRO stage": manifest.zero_stage} | manifest.config)
        for manifest in (saved, present)
    )
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys like `train.epochs`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def load(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint: weights, ema or optimizer."""
    return load_file(path / file_of(kind))


def load_state(path: Path) -> State:
    """All tensors of a checkpoint, by kind and name."""
    moments = load(path, OPTIMIZER)
    state = {
        kind: {
            name.removeprefix(f"{kind}."): tensor
            for name, tensor in moments.items()
            if name.startswith(f"{kind}.")
        }
        for kind in MOMENTS
    }
    kinds = (kind for kind in (WEIGHTS, EMA) if (path / file_of(kind)).exists())
    return state | {kind: load(path, kind) for kind in kinds}
