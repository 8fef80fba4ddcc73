"""Checkpoints: whole fp32 tensors, which any number of ranks and any ZeRO stage can go on from.

run/checkpoints/update-00000720/
    checkpoint.json          what it is, and the size and hash of each file
    weights.safetensors      the whole model, for timm, evaluation and export
    ema.safetensors          its moving average, if the run keeps one
    optimizer.safetensors    AdamW's moments: exp_avg.NAME, exp_avg_sq.NAME

A checkpoint is written under a hidden name and renamed when all of it is on the disk. There is no
pickle in it: reading one runs no code.
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
from torch import Tensor, nn

from irpe_ds.config import RunConfig
from irpe_ds.data.beton.manifest import file_sha256
from irpe_ds.errors import CheckpointError, UserError
from irpe_ds.files import fsync, replace_file
from irpe_ds.training.engine_state import EMA, MOMENTS, WEIGHTS, State
from irpe_ds.training.run_length import RunLength

FORMAT = 2
FOLDER, MANIFEST = "checkpoints", "checkpoint.json"
OPTIMIZER = "optimizer"


def file_of(kind: str) -> str:
    """Name of the file with these tensors: weights, ema or optimizer."""
    return f"{kind}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds, and what a run must share with it to go on from it."""

    format: int = FORMAT
    """Version of this record."""
    update: int = 0
    """Updates done."""
    epoch: int = 0
    """Epochs done."""
    images: int = 0
    """Images of the next epoch that are done, in its order."""
    updates_per_epoch: int
    """Updates in an epoch."""
    global_batch: int
    """Images per update."""
    num_samples: int
    """Images in the training set."""
    seed: int
    """All the state that random generators have: what they draw is a function of the seed, the
    update, the sample and the rank."""
    shapes: dict[str, list[int]]
    """Shape of every parameter of the model, by name."""
    world_size: int
    """Ranks that saved it; others may go on."""
    zero_stage: int
    """Stage it was trained with; others may go on."""
    op: dict[str, str]
    """Implementation of the attention op that trained it, and why it was taken."""
    config: dict[str, Any]
    """Configuration of the run."""
    steps: int = 0
    """Updates that AdamW has taken: those done, but for those left out."""
    loss_scaler: dict[str, float] | None = None
    """State of the dynamic loss scale; None but in fp16."""
    meter: dict[str, float] = field(default_factory=dict)
    """What the log has added up since its last row."""
    scores: dict[str, float] = field(default_factory=dict)
    """What the evaluation of this update found, if there was one."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and SHA-256 of each file beside this one."""

    def at(self, update: int, **found: Any) -> "Manifest":
        """The same run after so many updates, with what else is to be recorded then."""
        epoch, done = divmod(update, self.updates_per_epoch)
        images = done * self.global_batch
        return replace(self, update=update, epoch=epoch, images=images, **found)

    @property
    def score(self) -> float:
        """What the best checkpoint has most of; -1 without an evaluation."""
        return self.scores.get("ema_top1", self.scores.get("top1", -1.0))


MUST_AGREE = ("num_samples", "updates_per_epoch", "global_batch", "seed")


def describe(
    config: RunConfig,
    settings: Mapping[str, Any],
    plan: RunLength,
    model: nn.Module,
    world_size: int,
    op: Mapping[str, str],
) -> Manifest:
    """The manifest of this run before its first update."""
    return Manifest(
        updates_per_epoch=plan.updates_per_epoch,
        global_batch=config.train.global_batch,
        num_samples=plan.num_samples,
        seed=config.seed,
        shapes={name: list(p.shape) for name, p in model.named_parameters()},
        world_size=world_size,
        zero_stage=settings["zero_optimization"]["stage"],
        op=dict(op),
        config=config.model_dump(mode="json"),
    )


def save(
    folder: Path, manifest: Manifest, state: State, *, constants: dict[str, Tensor], keep: int
) -> Manifest:
    """Write a checkpoint, and remove all but the newest `keep` and the best. One rank calls it.

    Args:
        constants: what the state lacks of the model: the files of weights and ema hold all of it.

    Returns:
        The manifest as it was written.

    Raises:
        CheckpointError: it cannot be written; the checkpoints before it are as they were.
    """
    moments = {f"{kind}.{name}": t for kind in MOMENTS for name, t in state[kind].items()}
    contents = {OPTIMIZER: moments}
    contents |= {kind: constants | state[kind] for kind in (WEIGHTS, EMA) if kind in state}
    path = place(folder, manifest.update)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".update-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another process may read it still
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
        _remove(path)  # a damaged one that was passed over
        partial.rename(path)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(folder, "room for a checkpoint", str(error)) from None
    _prune(path, keep)
    return manifest


def add_scores(folder: Path, manifest: Manifest) -> Manifest:
    """Give the checkpoint of this manifest its scores."""
    path = place(folder, manifest.update)
    try:
        _write(path, manifest)
    except OSError as error:
        raise CheckpointError(path, "a checkpoint that can be written", str(error)) from None
    return manifest


def place(folder: Path, update: int) -> Path:
    """Where the checkpoint of an update lies."""
    return folder / f"update-{update:08d}"


def _write(path: Path, manifest: Manifest) -> None:
    replace_file(path / MANIFEST, _render(manifest))


def _render(manifest: Manifest) -> str:
    """JSON, a line per key, the last of which is the hash of the lines before it."""
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in asdict(manifest).items())
    body = "{\n" + ",\n".join(lines)
    return body + f',\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def _prune(newest: Path, keep: int) -> None:
    """Remove what is older than the newest `keep`, but for the best.

    Later ones are damaged: training has gone on from an earlier one, and will write over them.
    """
    found = [path for path in complete(newest.parent) if path.name <= newest.name]
    best = max(found, key=lambda path: (_score(path), path))
    for old in found[:-keep]:
        if old != best or _score(old) < 0:
            _remove(old)


def _score(path: Path) -> float:
    try:
        return read_manifest(path).score
    except UserError:
        return -1.0


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in between, or a reader, leaves none that looks whole."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"update-*/{MANIFEST}"))


def weights_of(run: Path, *, best: bool = False, ema: bool = False) -> Path:
    """The weights of a run's newest checkpoint, or of the one that was evaluated best.

    Args:
        run: the run folder.
        best: by the top-1 of the moving average where the run keeps one, else of the weights.
        ema: take the moving average instead.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """
    found = complete(run / FOLDER)
    if not found:
        raise CheckpointError(run, "a run folder with a checkpoint", "none")
    path = max(found, key=lambda path: (_score(path), path)) if best else found[-1]
    file = path / file_of(EMA if ema else WEIGHTS)
    if damage := fault(path):
        raise CheckpointError(path, "an undamaged checkpoint", damage)
    if not file.exists():
        raise CheckpointError(path, f"a checkpoint with {file.name} (train.ema_decay)", "none")
    return file


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is damaged, or another version's.
    """
    file = path / MANIFEST
    damaged = CheckpointError(file, "the manifest that was saved", "a damaged one")
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
        values.pop("sha256", None)
    except OSError as error:
        raise CheckpointError(file, "a manifest", error.strerror) from None
    except (ValueError, AttributeError):
        raise damaged from None
    if values.get("format") != FORMAT:
        raise CheckpointError(file, f"a manifest of format {FORMAT}", values.get("format"))
    try:
        manifest = Manifest(**values)
    except TypeError:
        raise damaged from None
    if _render(manifest) != text:
        raise damaged
    return manifest


def fault(path: Path) -> str | None:
    """What is damaged in a checkpoint, if anything; every byte is read."""
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
            return f"{name} holds other bytes than were saved"
    return None


class Found(NamedTuple):
    """A checkpoint to go on from."""

    path: Path | None
    """None: there is none."""
    damaged: list[str]
    """Newer ones that were passed over, and why."""


def newest_good(folder: Path) -> Found:
    """The newest checkpoint whose every byte is as it was saved.

    Raises:
        CheckpointError: there are checkpoints, all damaged.
    """
    damaged: list[str] = []
    # A folder without a manifest is one whose manifest was lost: saving shows them together.
    for path in sorted(folder.glob("update-*"), reverse=True):
        found = fault(path)
        if found is None:
            return Found(path, damaged)
        damaged.append(f"{path}: {found}")
    if damaged:
        raise CheckpointError(folder, "an undamaged checkpoint", "; ".join(damaged))
    return Found(None, [])


def check(path: Path, present: Manifest) -> Manifest:
    """The manifest of a checkpoint that the run described by `present` can go on from.

    Raises:
        CheckpointError: it belongs to another model, or to data in another order.
    """
    saved = read_manifest(path)
    if saved.shapes != present.shapes:
        names = saved.shapes.keys() | present.shapes.keys()
        name = min(n for n in names if saved.shapes.get(n) != present.shapes.get(n))
        there, here = (manifest.shapes.get(name, "absent") for manifest in (saved, present))
        got = f"another's: {name} of shape {there}, which is {here} here"
        raise CheckpointError(path, "the parameters of this model", got)
    for key in MUST_AGREE:
        if getattr(saved, key) != getattr(present, key):
            raise CheckpointError(
                path, f"{key} {getattr(present, key)}, as here", getattr(saved, key)
            )
    return saved


def changes(saved: Manifest, present: Manifest) -> list[str]:
    """What is not as it was when the checkpoint was saved, one `key: old -> new` each."""
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
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def load(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint: weights, ema or optimizer."""
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
    present = (kind for kind in (WEIGHTS, EMA) if (path / file_of(kind)).exists())
    return state | {kind: load(path, kind) for kind in present}
