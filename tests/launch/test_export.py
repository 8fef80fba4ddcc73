"""A run's weights leave it for timm and for the released code, and come back."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import irpe_ds
from irpe_ds.checkpoint import reader
from irpe_ds.config import RunConfig, load_config
from irpe_ds.errors import CheckpointError, ConfigError
from irpe_ds.models.build import build_model, load_weights
from irpe_ds.models.release import export
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.training.start import initial_manifest, run_length
from tests import checkpoint_ranks

NAME = "deit_tiny_patch16_224_ctx_product_50_shared_k"
EUCLIDEAN = {
    "name": "deit_tiny_patch16_224",
    "rpe": RPEConfig(method="euclidean", ratio=20),
}


def model(**options: Any) -> nn.Module:
    assert irpe_ds.__version__  # imported: timm knows our models
    return timm.create_model(NAME, depth=2, num_classes=7, **options).eval()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    own = [f"output={tmp_path}", "name=run", f"model.name={NAME}", "model.rpe=null"]
    own += ["model.num_classes=7", "model.img_size=224", "model.options={depth: 2}"]
    return load_config("launch/configs/quickstart.yaml", own)


@pytest.fixture
def state(config: RunConfig) -> dict[str, dict[str, torch.Tensor]]:
    """What the only checkpoint of the run holds; its tables are not zero."""
    torch.manual_seed(1)
    kinds = ("weights", "ema", "exp_avg", "exp_avg_sq")
    shapes = {name: p.shape for name, p in model().named_parameters()}
    state = {k: {n: 0.1 * torch.randn(shape) for n, shape in shapes.items()} for k in kinds}
    ds_config = {"zero_optimization": {"stage": 0}}
    length = run_length(config, 640)
    manifest = initial_manifest(config, ds_config, length, model(), world_size=1, op={})
    folder = config.folder / reader.FOLDER
    checkpoint_ranks.save(folder, manifest.at(3), state, world_size=2)
    return state


def logits(module: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return module(torch.randn(2, 3, 224, 224, generator=generator))


@pytest.mark.parametrize("kind", ["weights", "ema"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(
    suffix: str, kind: str, config: RunConfig, state: Any, tmp_path: Path
) -> None:
    out = tmp_path / f"exported{suffix}"
    export(config.folder, reader.weights_of(config.folder, ema=kind == "ema"), out)
    original = model()
    original.load_state_dict(state[kind])
    expected = logits(original)

    ours = build_model(config.model)
    load_weights(ours, out, where="--weights")
    assert torch.equal(logits(ours.eval()), expected)

    theirs = model(checkpoint_path=str(out))  # timm's own loading
    assert torch.equal(logits(theirs), expected)

    # As the released code reads a file: torch.load(...)["model"], every key as it is.
    pth = suffix == ".pth"
    released = torch.load(out, weights_only=True)["model"] if pth else load_file(out)
    keys = {name for name in released if "lookup_table" in name}
    assert keys == {f"blocks.{n}.attn.rpe_k.lookup_table_weight" for n in range(2)}
    assert released.keys() == original.state_dict().keys()

    # What the file says of its positions: weights of another encoding are not loaded.
    other = build_model(config.model.model_copy(update=EUCLIDEAN))
    with pytest.raises(ConfigError, match=r"method euclidean, ratio 20, got .* method product"):
        load_weights(other, out, where="--weights")


def test_the_script(run: Any, config: RunConfig, state: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (sys.executable, "launch/export.py", "--run", config.folder, "--best", "--ema")
    done = run(*script, "--out", out, "--license", "mit")
    assert done.returncode == 0, done.stderr
    path = config.folder / "checkpoints" / "update-00000003"
    assert done.stdout == f"{out}: {len(state['ema'])} tensors of {path}\n"
    files = {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in out.iterdir()} == files
    for options, message in (
        (("--out", tmp_path / "x.pt"), "--out: expected a folder, or a name that ends in"),
        (("--out", tmp_path / "x.pth", "--push", "me/mine"), "--out: expected a folder, with --p"),
    ):
        done = run(*script, *options)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_checkpoint_s_folder_is_weights_too(config: RunConfig, state: Any) -> None:
    path = reader.weights_of(config.folder).path
    ours = build_model(config.model.model_copy(update={"weights": path}))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state["weights"][name]), name
    with pytest.raises(ConfigError, match=r"method euclidean, ratio 20, got .* method product"):
        build_model(config.model.model_copy(update={"weights": path, **EUCLIDEAN}))
    with pytest.raises(ConfigError, match=r"a checkpoint's folder with checkpoint\.json, got"):
        build_model(config.model.model_copy(update={"weights": config.folder}))
    (path / "rank-00000-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^model\.weights: .*damaged .* is missing"):
        build_model(config.model.model_copy(update={"weights": path}))


def test_a_damaged_checkpoint_is_not_exported(
    run: Any, config: RunConfig, state: Any, tmp_path: Path
) -> None:
    path = reader.weights_of(config.folder).path / "rank-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    out = tmp_path / "x.pth"
    done = run(sys.executable, "launch/export.py", "--run", config.folder, "--out", out)
    assert done.returncode == 2
    assert f"{path.name} has" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
