"""A trained model goes elsewhere: `irpe_ds.load`, timm's `local-dir:`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import RepoUrl
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

import irpe_ds
from irpe_ds.checkpoint import reader
from irpe_ds.checkpoint.reader import weights_of
from irpe_ds.config import RunConfig, load_config
from irpe_ds.errors import UserError
from irpe_ds.files import replace_file
from irpe_ds.models import release
from irpe_ds.models.build import build_deferred
from irpe_ds.models.deferred import materialize
from irpe_ds.models.exported import Images
from irpe_ds.models.release import export
from irpe_ds.training.start import initial_manifest, run_length
from tests import checkpoint_ranks

ZOO_K = "deit_tiny_patch16_224_ctx_product_50_shared_k"
IMAGES = torch.linspace(-1, 1, 2 * 3 * 24 * 24).view(2, 3, 24, 24)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Make = Callable[..., tuple[Path, dict[str, dict[str, Tensor]]]]


def run_config(folder: Path, *overrides: str) -> RunConfig:
    own = [f"output={folder}", "name=run", "model.options.depth=2", "model.options.embed_dim=16"]
    return load_config("launch/configs/quickstart.yaml", [*own, "data.val_crop=0.9", *overrides])


def make_in(folder: Path) -> Make:
    def make(*overrides: str, kinds: tuple[str, ...] = ("weights", "ema")) -> Any:
        config = run_config(folder, *overrides)
        model, _ = build_deferred(config.model.without_weights(), seed=0)
        manifest = initial_manifest(
            config,
            {"zero_optimization": {"stage": 0}},
            run_length(config, 640),
            model,
            world_size=1,
            op={},
        )
        states = []
        for update, top1 in ((3, 90.0), (5, 80.0)):
            torch.manual_seed(update)
            state = {
                kind: {name: 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}
                for kind in (*kinds, "exp_avg", "exp_avg_sq")
            }
            average = {"ema_top1": top1 + 1, "ema_top5": 99.0, "ema_loss": 0.5}
            scores = {"top1": top1, "top5": 98.0, "loss": 0.6, "images": 359.0, **average}
            scored = manifest.at(update, scores=scores)
            checkpoint_ranks.save(config.folder / reader.FOLDER, scored, state, keep=2)
            states.append(state)
        replace_file(config.folder / "config.yaml", config.dump())
        return config.folder, states[0]

    return make


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run folder with checkpoints of random values, the first the better; and the values."""
    return make_in(tmp_path)


def expected(config: RunConfig, state: dict[str, Tensor]) -> Tensor:
    """Logits of the run's own model."""
    model, initial = build_deferred(config.model.without_weights(), seed=0)
    for name, parameter in model.named_parameters():
        initial.replace(name, state[name], parameter.dtype)
    with torch.no_grad():
        return materialize(model, initial).eval()(IMAGES)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


def test_a_run(make: Make, tmp_path: Path) -> None:
    """Its best checkpoint, the moving average if it has one."""
    for kinds in (("weights", "ema"), ("weights",)):
        run, state = make(f"output={tmp_path / kinds[-1]}", kinds=kinds)
        model, _, classes = irpe_ds.load(run)
        torch.testing.assert_close(logits(model), expected(run_config(tmp_path), state[kinds[-1]]))
        assert not model.training
        assert classes is None
    (run / "classes.json").write_text(json.dumps(NAMES))
    assert irpe_ds.load(str(run)).classes == tuple(NAMES)
    (run / "classes.json").write_text(json.dumps(NAMES[1:]))
    with pytest.raises(UserError, match=r"json: expected 10 names, as model\.num_classes, got 9$"):
        irpe_ds.load(run)


def test_the_transform(make: Make) -> None:
    """Bicubic, the centre, normalised: what the validation of pipeline `timm` does."""
    transform = irpe_ds.load(make("data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]")[0]).transform
    pixels = np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    resized = image.resize((26, 32), Image.Resampling.BICUBIC)  # 24 / 0.9, and by its aspect
    wanted = normalize(to_tensor(resized.crop((1, 4, 25, 28))), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.testing.assert_close(transform(image), wanted)
    assert transform(image.convert("L")).shape == (3, 24, 24)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.rpe={method: cross, on: qkv}", "model.resolutions=[[0, 16], [3, 24]]"),
        ("model.rpe=null", "model.drop_path=0.1"),
        (f"model.name={ZOO_K}", "model.rpe=null"),
        ("model.name=eva02_tiny_patch14_224",),
        ("model.name=beitv2_base_patch16_224",),
    ],
    ids=["equipped", "progressive", "plain", "zoo", "EVA-02", "BEiT v2"],
)
def test_an_export(overrides: tuple[str, ...], make: Make, tmp_path: Path) -> None:
    run, state = make(*overrides)
    (run / "classes.json").write_text(json.dumps(NAMES))
    wanted = expected(run_config(tmp_path, *overrides), state["ema"])
    for name in ("folder", "file.safetensors"):
        out = tmp_path / name
        export(run, weights_of(run, best=True, ema=True), out)
        model, transform, classes = irpe_ds.load(out)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
        assert classes == tuple(NAMES)
        assert transform.images == Images.of(run_config(tmp_path, *overrides))
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert tuple(model.pretrained_cfg["label_names"]) == tuple(NAMES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    run, _ = make_in(folder)(kinds=("weights",))
    export(run, weights_of(run), folder / "exported")
    return folder / "exported"


@pytest.fixture
def exported(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "exported"))


def change(exported: Path, keys: str, value: Any) -> None:
    """Set config.json's a.b.c to a value."""
    path = exported / "config.json"
    said = json.loads(path.read_text())
    *sections, last = keys.split(".")
    section = said
    for key in sections:
        section = section[key]
    section[last] = value
    path.write_text(json.dumps(said))


def test_another_encoding_is_not_loaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables have the same shapes. A cache of the hub is where timm finds a repository."""
    cache = tmp_path / "models--me--mine"
    exported = cache / "snapshots" / "1234"
    shutil.copytree(made, exported)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1234")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def from_hub(_: Path) -> nn.Module:
        return timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path)

    def from_folder(path: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{path}", pretrained=True)

    torch.testing.assert_close(logits(from_hub(made).eval()), logits(irpe_ds.load(made).model))
    change(exported, "model_args.rpe.ratio", 1.95)
    for read in (irpe_ds.load, from_folder, from_hub):
        with pytest.raises(UserError, match=r"the encoding of model\.rpe, ratio 1.95, got .* 1.9"):
            read(exported)


def test_a_released_name_with_weights_of_another_encoding(make: Make, tmp_path: Path) -> None:
    run, _ = make(f"model.name={ZOO_K}", "model.rpe=null")
    export(run, weights_of(run), tmp_path / "exported")
    path = tmp_path / "exported" / "model.safetensors"
    with safe_open(path, "pt") as file:
        stated = file.metadata()["positions"].replace("contextual", "bias")
    save_file(load_file(path), path, {"positions": stated})
    with pytest.raises(UserError, match=r"differs from what was written"):
        irpe_ds.load(tmp_path / "exported")
    with pytest.raises(UserError, match=r"the encoding of model\.rpe, mode contextual, got mode b"):
        timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("architecture", "no_such_model", "model.name: expected a timm model name"),
        ("architecture", "resnet18", "model_args: expected the model of these weights|model: "),
        ("model_args.depth", 10**6, "model_args: expected integers up to 65536, got"),
        ("model_args.depth", 60_000, "model_args: expected a model of the tensors in its file"),
        ("model_args.patch_size", 1, "model.rpe: expected at most 16384 tokens|the model of these"),
        ("model_args.embed_dim", 60_000, "model_args: expected the model of these weights"),
        ("model_args.checkpoint_path", "/etc/passwd", "model.options: expected no argument"),
        ("model_args.pretrained", True, "model_args: expected arguments of a model alone"),
        ("model_args.rpe", {"method": "best"}, "rpe.method: expected one of"),
        ("pretrained_cfg.input_size", [3, 4096, 4096], "model.rpe: expected at most 16384 tokens"),
        ("pretrained_cfg.input_size", [3, 24, 10**9], "less than or equal to 4096"),
        ("pretrained_cfg.interpolation", "magic", "'bicubic' or 'bilinear', got 'magic'"),
        ("pretrained_cfg.mean", ["x", 0, 0], "pretrained_cfg.mean.0: expected a valid number"),
        ("label_names", ["one"], "label_names: expected 10, the number of classes, got 1"),
        ("irpe", None, "irpe: expected an object, got None"),
    ],
)
def test_what_a_config_cannot_do(keys: str, value: Any, message: str, exported: Path) -> None:
    change(exported, keys, value)
    with pytest.raises(UserError, match=message) as caught:
        irpe_ds.load(exported)
    assert str(exported) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_export(exported: Path, tmp_path: Path) -> None:
    weights = exported / "model.safetensors"
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    for path, message in (
        (tmp_path / "nothing", "load: expected a run folder, .*, got nothing at "),
        (tmp_path, "config.json: No such file"),
        (
            tmp_path / "a.safetensors",
            "expected a file that says its model, as launch/export.py writes it",
        ),
    ):
        with pytest.raises(UserError, match=message):
            irpe_ds.load(path)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="shorter than its header says"):
        irpe_ds.load(exported)
    weights.unlink()
    with pytest.raises(UserError, match="No such file"):
        irpe_ds.load(exported)


def test_the_card(make: Make, tmp_path: Path) -> None:
    """Data, recipe, scores, versions and licence; no folder of this machine."""
    run, _ = make("model.weights=/secret/place/w.pth")
    (run / "classes.json").write_text(json.dumps(NAMES))
    packages = {"torch": "2.14.1", "ffcv": None}
    (run / "environment.json").write_text(json.dumps({"commit": "abc", "packages": packages}))
    export(run, weights_of(run, best=True, ema=True), tmp_path / "out", "mit")
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, page = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "mit"
    recipe = yaml.safe_load(page.partition("## Recipe\n\n```yaml\n")[2].partition("```")[0])
    assert recipe["model"]["rpe"]["method"] == "product"
    assert recipe["model"]["weights"] == "w.pth"
    assert "secret" not in text
    assert str(tmp_path) not in text
    for said in (
        "640 images",
        "- seven",
        "| 91.00 % |",
        "- commit: abc",
        "- packages: torch 2.14.1\n",
    ):
        assert said in page, said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["irpe"]["origin"] == {
        "run": "run",
        "update": 3,
        "epoch": 0,
        "average": True,
        "commit": "abc",
        "packages": packages,
    }


class TestPush:
    def test_three_files(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, Any]] = []

        class Api:
            def __init__(self, **_: Any) -> None:
                pass

            def create_repo(self, name: str, **options: Any) -> RepoUrl:
                calls.append((name, options))
                return RepoUrl(f"https://huggingface.co/{name}")

            def upload_folder(self, **options: Any) -> None:
                calls.append(("upload", options))

        monkeypatch.setattr(release, "check_network", lambda: None)
        monkeypatch.setattr("huggingface_hub.HfApi", Api)
        (exported / "more").write_text("stays here")
        assert release.push(exported, "owner/name") == "https://huggingface.co/owner/name"
        files = ["config.json", "README.md", "model.safetensors"]
        assert calls == [
            ("owner/name", {"private": True, "exist_ok": True}),
            ("upload", dict(repo_id="owner/name", folder_path=exported, allow_patterns=files)),
        ]
        assert {path.name for path in exported.iterdir()} == {*files, "more"}

    def test_no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(release, "check_network", fail)
        expected = "^--push: expected a network and a login .hf auth login., got no route to host$"
        with pytest.raises(UserError, match=expected):
            release.push(tmp_path, "owner/name")


@pytest.mark.parametrize("base", ["vit_tiny_patch16_224", "qwen3_vit_88m"])
def test_timm_s_own_export(base: str, tmp_path: Path) -> None:
    """timm.models.save_for_hf of a model called `irpe`: local-dir: builds it again."""
    narrow = {"img_size": 24, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
    rpe = {"method": "cross", "on": "qk"}
    model = timm.create_model("irpe", base=base, rpe=rpe, num_classes=7, **narrow).eval()
    tables = [value for name, value in model.named_parameters() if "lookup_table" in name]
    assert len(tables) == 4
    for table in tables:
        nn.init.normal_(table)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(logits(again), logits(model))
    with pytest.raises(UserError, match=r"config\.json: irpe: expected a value, got nothing$"):
        irpe_ds.load(tmp_path)
