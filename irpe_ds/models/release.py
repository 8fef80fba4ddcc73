"""What `launch/export.py` writes of a run: a folder in timm's layout, or one file of weights."""

from pathlib import Path

import torch

from irpe_ds.checkpoint.manifest import read_manifest
from irpe_ds.checkpoint.reader import SavedWeights
from irpe_ds.checkpoint.whole import write_whole
from irpe_ds.config import RunConfig, validate
from irpe_ds.environment import ENVIRONMENT, Environment, read_environment
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.files import atomic_write, replace_file
from irpe_ds.models.build import saved_positions
from irpe_ds.models.card import model_card
from irpe_ds.models.create import meta_model
from irpe_ds.models.exported import CONFIG, describe
from irpe_ds.models.loading import run_classes
from irpe_ds.models.positions import KEY
from irpe_ds.models.pretrained import check_network
from irpe_ds.models.zoo import WEIGHTS

CARD = "README.md"
FILES = (".safetensors", ".pth")


def export(run: Path, weights: SavedWeights, out: Path, license: str | None = None) -> None:
    """Write a run's weights, and what they are of.

    Args:
        out: a .safetensors or .pth file, or else a folder for `local-dir:` and `hf-hub:` of timm,
            with a model card.
        license: of the weights, by the hub's name, such as apache-2.0.

    Raises:
        ConfigError: it cannot be written.
        UserError: the run's files cannot be read, or are of another version.
    """
    positions = saved_positions(weights)
    said = {} if positions is None else {KEY: positions.to_json()}
    about = _about(run, weights, license)
    if about is not None:
        said[CONFIG] = about[CONFIG]
    try:
        if out.suffix in FILES:
            out.parent.mkdir(parents=True, exist_ok=True)
            return _write(weights, out, said)
        if about is None:
            raise ConfigError("--out", ".safetensors or .pth, for a run of another version", out)
        out.mkdir(parents=True, exist_ok=True)
        _write(weights, out / WEIGHTS, said)
        for name, text in about.items():
            replace_file(out / name, text)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out}: {error}") from None


def _write(weights: SavedWeights, path: Path, said: dict[str, str]) -> None:
    with atomic_write(path) as partial:
        if path.suffix == ".pth":
            torch.save({"model": dict(weights), **said}, partial)
        else:
            write_whole(partial, weights.files, weights.keys_in_files, said)


def _about(run: Path, weights: SavedWeights, license: str | None) -> dict[str, str] | None:
    """config.json and README.md; None if the run's configuration is of another version."""
    manifest = read_manifest(weights.path)
    try:
        config = validate(RunConfig, manifest.config)
    except UserError:
        return None
    environment = read_environment(run) if (run / ENVIRONMENT).exists() else Environment()
    origin = {
        "run": config.name,
        "update": manifest.update,
        "epoch": manifest.epoch,
        "average": weights.ema,
        "commit": environment.commit,
        "packages": environment.packages,
    }
    model, classes = meta_model(config.model), run_classes(run, config.model.class_count)
    what = config, model, manifest, environment, classes
    return {
        CONFIG: describe(config, model, classes, origin, license),
        CARD: model_card(*what, average=weights.ema, license=license),
    }


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to Hugging Face's hub; returns its URL.

    A repository that does not exist is made, as a private one.

    Raises:
        ConfigError: there is no network, or the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        check_network()
        api = HfApi(library_name="irpe-ds")
        url = api.create_repo(repository, private=True, exist_ok=True)
        files = [CONFIG, CARD, WEIGHTS]
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, allow_patterns=files)
    except Exception as error:  # of huggingface_hub, of httpx or of the system
        got = str(error).strip().partition("\n")[0]
        raise ConfigError("--push", "a network and a login (hf auth login)", got) from None
    return str(url)
