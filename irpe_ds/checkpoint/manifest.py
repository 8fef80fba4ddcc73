"""checkpoint.json: what a checkpoint holds, in which files, and what its run must agree with."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from irpe_ds.config_types import Count, Natural, OptimizerName, Positive
from irpe_ds.errors import CheckpointError
from irpe_ds.files import read_regular, replace_file
from irpe_ds.schema import Number, Plain, Spelled, parse_json, spell

FORMAT = 3
OLDEST = 2
"""The oldest format that can be read."""
WEIGHTS, EMA = "weights", "ema"
MOMENTS: dict[OptimizerName, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "nadamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}
"""What an optimizer keeps of each weight: with the above, the kinds of tensors."""
MANIFEST = "checkpoint.json"
LIMIT = 16 << 20
"""Largest manifest that is read, bytes."""

Shape = Annotated[list[Natural], Field(max_length=16)]


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint, as it was written."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    bytes: Natural
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class LossScaler:
    """State of DeepSpeed's DynamicLossScaler, which has no state_dict, by the attribute's name."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    cur_scale: Positive
    cur_iter: Natural
    last_overflow_iter: Annotated[int, Field(strict=True, ge=-1)]
    cur_hysteresis: Natural


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint holds, and what a run must have in common with it to resume from it."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    format: Natural = FORMAT
    """Version of this format."""
    update: Natural = 0
    """Updates done."""
    epoch: Natural = 0
    """Epochs done."""
    images: Natural = 0
    """Images of the current epoch that are done, in its order."""
    updates_per_epoch: Count
    """Updates in an epoch."""
    global_batch: Count
    """Images per update."""
    num_samples: Count
    """Images in the training set."""
    seed: Natural
    """The only random state: what is drawn is a function of seed, update, sample and rank."""
    shapes: dict[str, Shape]
    """Shape of every parameter of the model, by name."""
    constants: dict[str, Shape] = field(default_factory=dict)
    """Shapes of what is not trained, and saved with the weights: buffers, frozen parameters."""
    optimizer: OptimizerName = "adamw"
    """Whose moments it has."""
    ema: Annotated[bool, Field(strict=True)] = False
    """Whether it has a moving average of the weights."""
    world_size: Count
    """Number of ranks that saved it; any number may resume."""
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    """ZeRO stage it was trained with; any stage may resume."""
    op: dict[str, str]
    """Implementation of the attention op that trained it, and why it was chosen."""
    config: dict[str, Plain]
    """Configuration of the run."""
    steps: Natural = 0
    """Updates that the optimizer has applied: those done, less those skipped."""
    loss_scaler: LossScaler | None = None
    """State of the dynamic loss scale; None unless in fp16."""
    meter: dict[str, Number] = field(default_factory=dict)
    """Sums of the training metrics since the last log row."""
    scores: dict[str, Spelled] = field(default_factory=dict)
    """Results of the evaluation at this update, if there was one."""
    files: dict[str, SavedFile] = field(default_factory=dict)
    """The files beside this one."""

    def at(self, update: int, **state: Any) -> "CheckpointManifest":
        """The manifest of the same run after `update` updates, with other fields replaced."""
        epoch, done = divmod(update, self.updates_per_epoch)
        images = done * self.global_batch
        return replace(self, update=update, epoch=epoch, images=images, **state)

    @property
    def score(self) -> float:
        """The top-1 accuracy that picks the best checkpoint; -1 without an evaluation."""
        score = self.scores.get("ema_top1", self.scores.get("top1", -1.0))
        return -1.0 if math.isnan(score) else score


def shard_names(world_size: int) -> list[str]:
    """The names of the files that ranks write, by rank."""
    return [f"rank-{n:05d}-of-{world_size:05d}.safetensors" for n in range(world_size)]


def write_manifest(path: Path, manifest: CheckpointManifest) -> None:
    """Write a checkpoint's manifest: a line per key, the last the hash of the lines before it."""
    values = asdict(manifest)
    values["scores"] = {name: spell(score) for name, score in manifest.scores.items()}
    lines = (f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in values.items())
    body = "{\n" + ",\n".join(lines)
    replace_file(path / MANIFEST, body + _last_line(body))


def _last_line(body: str) -> str:
    return f',\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is damaged, has another format version, or what it says
            cannot be true.
    """
    file = path / MANIFEST
    try:
        text = read_regular(file, LIMIT).decode()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: damaged manifest") from None
    body, _, _ = text.rpartition(',\n "sha256"')
    is_whole = body + _last_line(body) == text
    text, body = _without_nan(text), _without_nan(body)
    version = parse_json(text, dict[str, Any], file, CheckpointError).get("format")
    if type(version) is not int or not OLDEST <= version <= FORMAT:
        raise CheckpointError(file, f"a manifest of format {OLDEST} to {FORMAT}", version)
    if not is_whole:
        raise CheckpointError(f"{file}: damaged manifest")
    manifest = parse_json(body + "\n}", CheckpointManifest, file, CheckpointError)
    _check(manifest, path)
    return manifest


def _without_nan(text: str) -> str:
    """Scores spelled as today: manifests of 2026 may have Python's NaN and Infinity."""
    return re.sub(
        r'^ "scores": .*$',
        lambda line: re.sub(
            r"(?<=: )(NaN|-?Infinity)\b", lambda word: json.dumps(str(float(word[1]))), line[0]
        ),
        text,
        flags=re.MULTILINE,
    )


def _check(manifest: CheckpointManifest, path: Path) -> None:
    """Raise CheckpointError if fields contradict one another, or the name of the folder."""
    numbered = re.fullmatch(r"update-(\d+)", path.name)
    derived = manifest.at(
        int(numbered[1]) if numbered else manifest.update,
        updates_per_epoch=manifest.num_samples // manifest.global_batch,
        steps=min(manifest.steps, manifest.update),
    )
    place = ("epoch", "images") if manifest.epoch or manifest.images else ()
    for key in ("update", "updates_per_epoch", "steps", *place):
        expected, got = getattr(derived, key), getattr(manifest, key)
        if expected != got:
            raise CheckpointError(f"{path / MANIFEST}: {key}", str(expected), got)
    for name in manifest.constants.keys() & manifest.shapes.keys():
        if manifest.constants[name] != manifest.shapes[name]:
            where = f"{path / MANIFEST}: constants.{name}"
            raise CheckpointError(where, str(manifest.shapes[name]), manifest.constants[name])
    if manifest.meter.keys() not in (set(), {"loss", "passes"}):
        raise CheckpointError(f"{path / MANIFEST}: meter", "loss and passes", [*manifest.meter])
    _check_files(manifest, f"{path / MANIFEST}: files")


def _check_files(manifest: CheckpointManifest, where: str) -> None:
    """Raise CheckpointError unless the files are those of the format: no other is looked at."""
    files = manifest.files
    if manifest.format < FORMAT:
        names = [f"{WEIGHTS}.safetensors", "optimizer.safetensors"]
        names += [name for name in (f"{EMA}.safetensors",) if name in files]
    elif manifest.world_size == len(files):
        names = shard_names(manifest.world_size)
    else:
        raise CheckpointError(where, f"{manifest.world_size}, one of each rank", len(files))
    for name in names:
        if name not in files:
            raise CheckpointError(where, name, "nothing")
    for name in files.keys() - names:
        raise CheckpointError(where, "no other file", repr(name))
