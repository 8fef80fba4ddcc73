"""What `launch/export.py` writes of a run: a folder in timm's layout, or one file of weights."""

from pathlib import Path

import torch

from irpe_ds.checkpoint.manifest import read_manifest
from irpe_ds.checkpoint.reader import SavedWeights
from irpe_ds.checkpoint.shards import write_whole
from irpe_ds.config import RunConfig, validate
from irpe_ds.environment import ENVIRONMENT, Environment, read_environment
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.files import atomic_write, replace_file
from irpe_ds.models.build import meta_model, saved_positions
from irpe_ds.models.exported import CONFIG, describe
from irpe_ds.models.loading import run_classes
from irpe_ds.models.positions import KEY
from irpe_ds.models.zoo import WEIGHTS

FILES = (".safetensors", ".pth")


def export(run: Path, weights: SavedWeights, out: Path) -> None:
    """Write a run's weights, and what they are of.

    Args:
        out: a .safetensors or .pth file, or else a folder for `local-dir:` and `hf-hub:` of timm.

    Raises:
        ConfigError: it cannot be written.
        UserError: the run's files cannot be read, or are of another version.
    """
    said = _said(run, weights)
    try:
        if out.suffix in FILES:
            out.parent.mkdir(parents=True, exist_ok=True)
            return _write(weights, out, said)
        if CONFIG not in said:
            raise ConfigError("--out", ".safetensors or .pth for a run of this version", out)
        out.mkdir(parents=True, exist_ok=True)
        _write(weights, out / WEIGHTS, said)
        replace_file(out / CONFIG, said[CONFIG])
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out}: {error}") from None


def _write(weights: SavedWeights, path: Path, said: dict[str, str]) -> None:
    with atomic_write(path) as partial:
        if path.suffix == ".pth":
            torch.save({"model": dict(weights), **said}, partial)
        else:
            write_whole(partial, weights.files, weights.keys_in_files, said)


def _said(run: Path, weights: SavedWeights) -> dict[str, str]:
    """What a file says beside its tensors; less if the run is of a version with other keys."""
    positions = saved_positions(weights)
    said = {} if positions is None else {KEY: positions.to_json()}
    manifest = read_manifest(weights.path)
    try:
        config = validate(RunConfig, manifest.config)
    except UserError:
        return said
    environment = read_environment(run) if (run / ENVIRONMENT).exists() else Environment()
    origin = {
        "run": config.name,
        "update": manifest.update,
        "epoch": manifest.epoch,
        "average": weights.ema,
        "commit": environment.commit,
        "packages": environment.packages,
    }
    text = describe(config, meta_model(config.model), run_classes(run), origin)
    return {**said, CONFIG: text}
