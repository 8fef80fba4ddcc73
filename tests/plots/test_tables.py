"""Relative position tables of a checkpoint: what is drawn, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from irpe_ds.checkpoint.reader import CheckpointManifest
from irpe_ds.config import load_config
from irpe_ds.errors import CheckpointError, ConfigError, DataError
from irpe_ds.models.build import build_model
from irpe_ds.models.positions import KEY, Positions
from irpe_ds.plots import tables
from launch import tables as script
from tests import checkpoint_ranks

ROOT = Path(__file__).parents[2]
BIAS = "model.rpe={method: cross, mode: bias, on: k, ratio: 1.9}"
SHARED = np.array([-2.0, -2, -1, 0, 1, 2, 2])  # offsets of 2 and 3 patches share a bucket


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A YAML of a model with tables on keys and values, and the ImageFolder that it names."""
    for number in range(6):
        image = tmp_path / f"val/{'ab'[number % 2]}/{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 16, 3), 40 * number, np.uint8)).save(image)
    path = tmp_path / "x.yaml"
    path.write_text(f"""
name: known
model:
  name: vit_tiny_patch16_224
  rpe: {{method: cross, on: kv}}
  num_classes: 2
  img_size: [12, 16]
  options: {{patch_size: 4, embed_dim: 32, depth: 3, num_heads: 2}}
data: {{train: {tmp_path}/val, val: {tmp_path}/val, pipeline: timm, workers: 1}}
""")
    return path


def save(config: Path, *overrides: str) -> Path:
    """Weights whose bias on keys, if it is one, is in layer 1 the offset in columns."""
    model = build_model(load_config(config, overrides).model)
    for name, parameter in model.named_parameters():
        if name == "blocks.1.attn.rpe_k.rp_cols.lookup_table_bias":
            parameter.data[0, :7] = torch.arange(3.0, -4.0, -1)  # its offsets point to the query
        elif name.endswith("lookup_table_weight"):
            torch.nn.init.normal_(parameter)
    positions = Positions.of(model).to_json()
    torch.save({"model": model.state_dict(), KEY: positions}, config.with_name("weights.pth"))
    return config.with_name("weights.pth")


def draw(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, arguments)])
    script.main()


def test_maps_stand_by_layer_and_head() -> None:
    maps = {n: np.random.default_rng(n).normal(size=(2, 5, 7)) for n in (0, 4)}
    figure = tables.draw_tables(maps, "k", "mine", inert=4)
    axes = [a for a in figure.axes if a.images]
    assert [a.get_title() for a in axes] == ["head 0", "head 1", "", ""]
    assert [a.get_ylabel() for a in axes] == ["layer 0", "", f"layer 4{tables.INERT}", ""]
    for place, drawn in zip([(0, 0), (0, 1), (4, 0), (4, 1)], axes, strict=True):
        layer, head = place
        (image,) = drawn.images
        assert np.array_equal(image.get_array(), maps[layer][head])
        assert image.get_clim() == (-np.abs(maps[layer]).max(), np.abs(maps[layer]).max())
        assert image.get_extent() == [-3.5, 3.5, 2.5, -2.5]
    assert figure.get_suptitle() == "mine: mean logit of relative position on keys"


def test_layers_of_one_map_stand_beside_each_other() -> None:
    maps = {n: np.full((1, 5, 5), n + 1.0) for n in range(6)}
    figure = tables.draw_tables(maps, "v", "mine")
    shown = [a for a in figure.axes if a.images]
    assert [a.get_title() for a in shown] == [f"layer {n}" for n in range(6)]
    assert [a.images[0].get_array()[0, 0] for a in shown] == [1, 2, 3, 4, 5, 6]
    rows = [a.get_subplotspec().rowspan.start for a in shown]
    assert rows == [0, 0, 0, 0, 1, 1]


def test_known_bias(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    """A table on columns alone: every row of the map is the same, and it grows to the right."""
    drawn = {}
    monkeypatch.setattr(tables, "validation_images", lambda *_: pytest.fail("needs no images"))
    original = tables.draw_tables
    monkeypatch.setattr(
        tables, "draw_tables", lambda maps, *rest: drawn.update(maps) or original(maps, *rest)
    )
    out = config.with_name("deep") / "t.png"
    weights = save(config, BIAS)
    arguments = ("--config", config, "--weights", weights, "--layers", "0,1", BIAS, "--out", out)
    draw(monkeypatch, *arguments)
    assert list(drawn) == [0, 1]
    assert not drawn[0].any()
    assert np.array_equal(drawn[1], np.broadcast_to(SHARED, (1, 5, 7)))
    assert imread(out)[..., :3].std() > 0.05


@pytest.mark.parametrize("on", ["k", "v"])
def test_png_of_contextual_tables(monkeypatch: pytest.MonkeyPatch, config: Path, on: str) -> None:
    out = config.with_name("t.png")
    weights = save(config)
    draw(monkeypatch, "--config", config, "--weights", weights, "--on", on, "--out", out)
    assert imread(out)[..., :3].std() > 0.05


def test_images_come_from_all_over_the_set(config: Path) -> None:
    unscaled = load_config(config, ["data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"])
    images = tables.validation_images(unscaled, 3)
    assert images.shape == (3, 3, 12, 16)
    # Sorted by class: a has images 0, 2 and 4, b has 1, 3 and 5.
    assert (255 * images[:, 0, 0, 0]).round().tolist() == [0, 160, 200]
    assert len(tables.validation_images(unscaled, 100)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "t.jpg"], r"--out: expected a name that ends in \.png"),
        (["--images", "0"], "--images: expected at least 1"),
        (["--layers", "0,3"], "--layers: expected numbers from 0 to 2"),
        (["--layers", "x"], "--layers: expected numbers from 0 to 2"),
        (["--on", "q"], "--on: expected one of k, v, which have tables, got q"),
        (["model.rpe=null"], "model: expected one with relative position tables, got vit_tiny"),
        (["model.rpe.last_block=false", "--layers", "2"], "--layers: expected numbers from 0 to 1"),
        (["model.options.depth=2"], "--weights: expected the weights of this"),
        (["data.val=nowhere"], "data.val: expected"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, config: Path, arguments: list[str], message: str
) -> None:
    weights = save(config)
    kind = DataError if message.startswith("data.") else ConfigError
    with pytest.raises(kind, match=message):
        draw(monkeypatch, "--config", config, "--weights", weights, *arguments)


def test_mistakes_end_with_code_2_and_one_message(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/tables.py", "--config", config],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.endswith("error: --config needs --weights, as it names no run\n")
    assert "Traceback" not in done.stderr


def test_run_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    config.rename(config.with_name("config.yaml"))
    with pytest.raises(CheckpointError, match="no checkpoint in this run folder"):
        draw(monkeypatch, "--run", config.parent)


def test_newest_checkpoint_of_a_run(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    state = {"weights": torch.load(save(config))["model"]}
    run: dict[str, Any] = {"updates_per_epoch": 5, "global_batch": 8, "num_samples": 40, "seed": 0}
    run |= {"world_size": 1, "zero_stage": 0, "op": {}}
    run["config"] = load_config(config).model_dump(mode="json")
    run["shapes"] = {name: list(tensor.shape) for name, tensor in state["weights"].items()}
    manifest = CheckpointManifest(**run).at(2)
    checkpoint_ranks.save(config.parent / "checkpoints", manifest, state)
    config.rename(config.with_name("config.yaml"))
    out = config.with_name("t.png")
    draw(monkeypatch, "--run", config.parent, "--out", out)
    assert out.exists()
