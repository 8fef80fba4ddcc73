"""Checkpoints: the whole training state, from which any number of ranks and any stage can resume.

run/checkpoints/update-00000720/
    checkpoint.json                     the manifest, with the size and hash of each file
    rank-00000-of-00002.safetensors     what rank 0 held: ranges of the flattened tensors
    rank-00001-of-00002.safetensors         weights.NAME, exp_avg.NAME, exp_avg_sq.NAME, ema.NAME;
                                            other optimizers have other moments

All trained tensors are in fp32. A checkpoint appears all at once: it is written under a hidden name
and renamed once it is on disk. It contains no pickles: reading one cannot run code. Checkpoints of
format 2, which had whole tensors in weights, ema and optimizer.safetensors, are read as well.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from irpe_ds.checkpoint.manifest import (
    EMA,
    FORMAT,
    MANIFEST,
    MOMENTS,
    WEIGHTS,
    CheckpointManifest,
    read_manifest,
    write_manifest,
)
from irpe_ds.checkpoint.shards import ShardFiles, whole_shapes
from irpe_ds.cluster.process_group import Ranks
from irpe_ds.errors import CheckpointError, UserError

FOLDER = "checkpoints"
ALL_KINDS = {WEIGHTS, EMA, *chain(*MOMENTS.values())}

UNCHANGED = {
    "num_samples": ("data.train", " images"),
    "global_batch": ("train.global_batch", ""),
    "seed": ("seed", ""),
    "optimizer": ("optim.name", ""),
}
"""What must stay the same, as order of the data and moments depend on it: fields of the manifest,
and their keys in the YAML."""


def path_of(folder: Path, update: int) -> Path:
    """The folder of an update's checkpoint."""
    return folder / f"update-{update:08d}"


def numbered(folder: Path) -> list[Path]:
    """The folders of checkpoints in a folder, oldest first; whatever else it has is left alone."""
    found = [path for path in folder.glob("update-*") if re.fullmatch(r"update-\d{8,}", path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have a manifest, oldest first."""
    return [path for path in numbered(folder) if (path / MANIFEST).exists()]


def score_of(path: Path) -> float:
    """The score of a checkpoint; -1 if its manifest cannot be read."""
    try:
        return read_manifest(path).score
    except UserError:
        return -1.0


def best_of(paths: Collection[Path]) -> Path:
    """The checkpoint with the highest score, the last of equals."""
    return max(paths, key=lambda path: (score_of(path), path))


def add_scores(folder: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    """Add the scores in this manifest to its checkpoint on disk."""
    path = path_of(folder, manifest.update)
    try:
        write_manifest(path, manifest)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint: {path}: {error}") from None
    return manifest


def find_damage(
    path: Path, part: int = 0, parts: int = 1, kinds: Collection[str] = ALL_KINDS
) -> str | None:
    """What is damaged in a checkpoint, if anything; reads every `parts`-th file once.

    Weights and moments that are not finite are damage: training on from them would only skip
    updates.

    Args:
        kinds: of the tensors that the files must have; part 0 looks for them.
    """
    try:
        recorded = read_manifest(path).files
        names = [*recorded][part::parts]
        for name in names:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != recorded[name].bytes:
                return f"{name} has {file.stat().st_size} bytes instead of {recorded[name].bytes}"
        files = open_files(path)
        for name in names:
            content = files.inspect(path / name)
            if content.sha256 != recorded[name].sha256:
                return f"{name} differs from what was saved"
            if content.damage is not None:
                return str(content.damage)
        if part == 0:
            files.check_layout(key for key in files.shapes if key.partition(".")[0] in kinds)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    return None


class Newest(NamedTuple):
    """The checkpoint to resume from."""

    path: Path | None
    """None if there is none."""
    damaged: list[str]
    """Newer ones that were skipped, each with what is damaged."""


def newest_undamaged(folder: Path, ranks: Ranks) -> Newest:
    """The newest checkpoint of which every byte is as saved; all ranks call it, and share the work.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    damaged: list[str] = []
    # A folder without a manifest has lost it: it appears together with its files.
    for path in ranks.on_rank0(lambda: numbered(folder)[::-1]):
        damage = damage_on_any(path, ranks)
        if damage is None:
            return Newest(path, damaged)
        damaged.append(f"{path}: {damage}")
    if damaged:
        raise CheckpointError(f"{folder}: every checkpoint is damaged: {'; '.join(damaged)}")
    return Newest(None, [])


def damage_on_any(path: Path, ranks: Ranks) -> str | None:
    """`find_damage`, by all ranks together."""
    found = ranks.all_gather(find_damage(path, ranks.rank, ranks.world_size))
    return next((damage for damage in found if damage is not None), None)


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
    for field, (key, unit) in UNCHANGED.items():
        there, here = getattr(saved, field), getattr(present, field)
        if here != there:
            raise CheckpointError(key, f"{there}{unit}, as in {path}", here)
    for key, (there, here) in _data_order(saved, present).items():
        if here != there:
            raise CheckpointError(key, f"{there}, as in {path}", here)
    return saved


def _data_order(*manifests: CheckpointManifest) -> dict[str, tuple[Any, ...]]:
    """Of each manifest, the keys that the order of images depends on, as far as it does."""
    data = [_flat(manifest.config) for manifest in manifests]
    found = {"data.order": tuple(values.get("data.order", "global") for values in data)}
    if set(found["data.order"]) == {"blocks"}:
        found["data.window"] = tuple(values.get("data.window") for values in data)
    return found


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


def open_files(path: Path, nearest: float = 0) -> ShardFiles:
    """The tensors of a checkpoint, as kind.NAME.

    Args:
        nearest: which of its files to look into first, as a fraction of their number.

    Raises:
        CheckpointError: its manifest or, in an old format, a file cannot be read.
    """
    manifest = read_manifest(path)
    files = [path / name for name in manifest.files]
    if manifest.format < FORMAT:
        return _open_whole(path, files, manifest)
    trained = {n: s for n, s in manifest.shapes.items() if n not in manifest.constants}
    kinds = (WEIGHTS, *MOMENTS[manifest.optimizer], *([EMA] if manifest.ema else []))
    shapes = {f"{kind}.{name}": shape for kind in kinds for name, shape in trained.items()}
    parameters = {*shapes, *(f"{WEIGHTS}.{name}" for name in manifest.shapes)}
    shapes |= {f"{WEIGHTS}.{name}": shape for name, shape in manifest.constants.items()}
    return ShardFiles(files, shapes, nearest, parameters=parameters)


def _open_whole(path: Path, files: Sequence[Path], manifest: CheckpointManifest) -> ShardFiles:
    """The tensors of format 2, whose shapes are in the files; frozen parameters have no moments."""
    prefixes = {f"{kind}.safetensors": f"{kind}." for kind in (WEIGHTS, EMA)}
    shapes = whole_shapes(files, prefixes)
    manifest = replace(manifest, ema=f"{EMA}.safetensors" in manifest.files)
    parameters, moments = set(), MOMENTS["adamw"]
    for name, shape in manifest.shapes.items():
        kinds = [WEIGHTS, *([EMA] if manifest.ema else [])]
        is_trained = any(f"{kind}.{name}" in shapes for kind in moments)
        for key in (f"{kind}.{name}" for kind in [*kinds, *(moments if is_trained else ())]):
            if shapes.get(key) != shape:
                got = shapes.get(key, "no such tensor")
                raise CheckpointError(f"{path}: {key}", f"shape {shape}", got)
            if is_trained:
                parameters.add(key)
    if not parameters:
        raise CheckpointError(f"{path}: exp_avg", "moments of the weights", "none")
    return ShardFiles(files, shapes, prefixes=prefixes, parameters=parameters)


class SavedWeights(Mapping[str, Tensor]):
    """The model's state dict in a checkpoint; each tensor is read when it is asked for.

    Args:
        path: the checkpoint.
        ema: the moving average of the trained tensors instead of the tensors.

    Raises:
        CheckpointError: it cannot be read, or has no average.
    """

    def __init__(self, path: Path, *, ema: bool = False) -> None:
        self.path, self.files, self.ema = path, open_files(path), ema
        averages = {name for kind, _, name in self._keys() if kind == EMA}
        if ema and not averages:
            raise CheckpointError(
                f"{path}: no moving average: the run keeps none (train.ema_decay); leave out --ema"
            )
        self.keys_in_files = {
            name: f"{EMA if ema and name in averages else WEIGHTS}.{name}"
            for kind, _, name in self._keys()
            if kind == WEIGHTS
        }

    def read(self, name: str, start: int, count: int) -> Tensor:
        """The elements [start, start + count) of a flattened tensor; (count,)."""
        return self.files.read(self.keys_in_files[name], start, count)

    def fits(self, model: nn.Module) -> bool:
        """Whether the model has tensors of these names and shapes, on any device."""
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        return shapes == {n: list(self.files.shapes[key]) for n, key in self.keys_in_files.items()}

    def __str__(self) -> str:
        return str(self.path)

    def _keys(self) -> Iterator[tuple[str, str, str]]:
        return (key.partition(".") for key in self.files.shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self.files.whole(self.keys_in_files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_in_files)

    def __len__(self) -> int:
        return len(self.keys_in_files)


def weights_of(run: Path, *, best: bool = False, ema: bool = False) -> SavedWeights:
    """The weights in a run's newest checkpoint, or in its best one.

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
    path = best_of(paths) if best else paths[-1]
    if damage := find_damage(path, kinds=(WEIGHTS, EMA)):
        raise CheckpointError(f"{path}: damaged checkpoint: {damage}")
    return SavedWeights(path, ema=ema)
