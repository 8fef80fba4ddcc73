"""The recipes of launch/configs/imagenet: the published numbers, and every one of them trains."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from irpe_ds.config import AugmentConfig, OptimConfig, RunConfig, TrainConfig, load_config
from irpe_ds.models.build import build_deferred
from irpe_ds.models.zoo import ZOO
from tests.launch.outcomes import tensors
from tests.launch.ranks import Ranks

FOLDER = Path("launch/configs/imagenet")
SMALL = [f"deit_small_{encoding}" for encoding in ("k", "qk", "qkv")]
SMALL += [f"deit_small_k_{method}" for method in ("cross", "euclidean", "quantization")]
MODELS = ["deit_tiny", "deit_tiny_k", "deit_small", *SMALL]
MODELS += ["deit_base", "deit_base_k", "deit_base_qkv"]
LARGE = {  # millions of parameters: README_revenge.md of DeiT, and the tables that the files name
    "deit3_large_k": 304.4,
    "deit3_huge_k": 632.1,
    "vit_giant_k": 1011,
    "vit_22b_k": 21743,
}
OTHERS = ("finetune", "distill_hard", "distill_soft", "deit3_large_finetune")
RECIPES = {name: FOLDER / f"{name}.yaml" for name in (*MODELS, *LARGE, *OTHERS)}
PLAIN = {f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
every_recipe = pytest.mark.parametrize("name", RECIPES)


def recipe(name: str) -> RunConfig:
    return load_config(RECIPES[name])


def test_there_is_one_for_every_model_of_the_zoo_and_plain_deit() -> None:
    names = [recipe(name).model.name for name in MODELS]
    assert sorted(names) == sorted(PLAIN | ZOO.keys())


def test_every_file_is_a_run_but_the_recipe_that_all_build_on() -> None:
    for path in FOLDER.glob("*.yaml"):  # yours too
        assert path.stem in ("deit", "deit3") or load_config(path).name


@pytest.mark.parametrize("name", MODELS)
def test_it_is_deits(name: str) -> None:
    """Every number of facebookresearch/deit's main.py, and of its README for the batch."""
    config = recipe(name)
    assert config.augment == AugmentConfig(
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        auto="rand-m9-mstd0.5-inc1",
        color_jitter=0.0,  # 0.4 there, without effect beside RandAugment
        erase=0.25,
        repeats=3,
        mixup=0.8,
        cutmix=1.0,
        mix_prob=1.0,
        mix_switch_prob=0.5,
        label_smoothing=0.1,
    )
    assert config.optim == OptimConfig(
        lr=5e-4,
        lr_batch=512,
        warmup_lr=1e-6,
        min_lr=1e-5,
        warmup_epochs=5,
        weight_decay=0.05,
        layer_decay=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        clip_grad=None,
    )
    assert config.train == TrainConfig(
        epochs=300, global_batch=1024, ema_decay=0.99996, precision="bf16"
    )
    assert (config.model.drop_path, config.model.img_size) == (0.1, (224, 224))
    assert (config.model.rpe, config.model.weights, config.distill.kind) == (None, None, "none")
    assert (config.data.val_crop, config.data.pipeline) == (0.875, "ffcv")


def test_fine_tuning_has_deits_numbers() -> None:
    config = recipe("finetune")
    optim = config.optim
    assert (optim.lr, optim.lr_batch, optim.min_lr) == (5e-6, 512, 5e-6)
    assert (optim.weight_decay, optim.warmup_epochs, optim.warmup_lr) == (1e-8, 5, 1e-6)
    assert (config.train.epochs, config.train.global_batch) == (30, 512)
    assert config.model.img_size == (384, 384)
    assert config.augment == recipe("deit_base_k").augment


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_has_deits_numbers(kind: str) -> None:
    config = recipe(f"distill_{kind}")
    distill = config.distill
    assert (distill.kind, distill.teacher) == (kind, "regnety_160")
    assert (distill.alpha, distill.tau) == (0.5, 1.0)
    assert (config.augment, config.optim) == (recipe("deit_small").augment, OptimConfig())


@pytest.mark.parametrize("name", ["deit3_large_k", "deit3_huge_k", "vit_giant_k"])
def test_it_is_deit_3s(name: str) -> None:
    """README_revenge.md's numbers, but for AdamW's own: lr, betas, and the clipping of LAMB."""
    config = recipe(name)
    assert config.augment == AugmentConfig(
        auto="3a", color_jitter=0.3, repeats=3, mixup=0.8, cutmix=1.0
    )
    assert config.optim == OptimConfig(lr=1e-4, lr_batch=256, betas=(0.9, 0.95), clip_grad=1.0)
    train = config.train
    assert (train.epochs, train.global_batch, train.loss) == (800, 2048, "bce")
    assert train.ema_decay == 0.99996
    size, rate = {"deit3_large_k": (192, 0.45)}.get(name, (154, 0.6))
    assert (config.model.img_size, config.model.drop_path) == ((size, size), rate)
    assert config.model.options["init_values"] == 1e-4


def test_fine_tuning_of_deit_3_has_its_numbers() -> None:
    config = recipe("deit3_large_finetune")
    assert config.augment == AugmentConfig(
        auto="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, label_smoothing=0.1
    )
    assert config.optim == OptimConfig(lr=1e-5, weight_decay=0.1)
    train = config.train
    assert (train.epochs, train.global_batch, train.loss) == (20, 512, "cross_entropy")


@pytest.mark.thorough
@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_has_the_published_size(name: str) -> None:
    """Within 3 %: layer scale, tables, attention pooling and the number of classes differ."""
    model, _ = build_deferred(recipe(name).model, seed=0)
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers / 1e6 == pytest.approx(LARGE[name], rel=0.03)
    tables = {key for key in model.state_dict() if "rpe_k.lookup_table_weight" in key}
    assert len(tables) == len(model.blocks)


@every_recipe
def test_its_header_says_how_and_what(name: str) -> None:
    header = RECIPES[name].read_text().split("\nbase:")[0]
    run = rf"#   deepspeed( --hostfile hosts)? launch/train\.py --config {RECIPES[name]}( \\)?"
    assert any(re.fullmatch(run, line) for line in header.splitlines())
    assert "GPUs. Time and accuracy here: not yet run." in header
    row = ZOO.get(recipe(name).model.name)
    if name in MODELS and row is not None and row.top1:
        assert f"# Published: top-1 {row.top1} %, top-5 {row.top5} % (iRPE)." in header


def test_runs_do_not_share_a_folder() -> None:
    assert len({recipe(name).folder for name in RECIPES}) == len(RECIPES)


UPDATES = 2
SIZES = {154: 4, 192: 3, 224: 4, 384: 6}  # patches for pixels
SMALL_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}
TEACHER = "test_resnet"
REDUCED = {
    *("output", "data.train", "data.val", "data.workers", "train.global_batch", "train.log_every"),
    *("train.max_updates", "model.img_size", "model.num_classes", "model.options", "model.weights"),
    *("distill.teacher", "distill.weights", "train.deepspeed"),
}
"""Keys that the trainings below set; all others are the recipe's."""


def overrides(name: str, folder: Path, digits: Path) -> list[str]:
    """What makes a recipe small enough for two updates on a CPU."""
    config = recipe(name)
    patch = 14 if config.model.name in ("deit3_huge_patch14_224", "vit_giant_patch14_224") else 16
    size = SIZES[config.model.img_size[0]] * patch
    small = [
        *(f"output={folder}", f"data.train={digits}/train.beton", f"data.val={folder}/val.beton"),
        *("data.workers=1", "train.global_batch=16", "train.log_every=1"),
        *(f"train.max_updates={UPDATES}", f"model.img_size={size}"),
        *("model.num_classes=10", *(f"model.options.{k}={v}" for k, v in SMALL_VIT.items())),
    ]
    if config.model.weights is not None:
        small += [f"model.weights={folder}/{name}.pth"]
    if "hpz" in config.train.deepspeed.stem:
        small += [f"train.deepspeed={folder}/hpz.json"]
    if config.distill.kind != "none":
        small += [f"distill.teacher={TEACHER}", f"distill.weights={folder}/teacher.pth"]
    return small


@pytest.fixture(scope="module")
def trained(run: Any, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs, one for each recipe, beside the files that they start from."""
    folder = tmp_path_factory.mktemp("recipes")
    for images in (digits / "val").iterdir():  # two of every class
        (folder / "val" / images.name).mkdir(parents=True)
        for image in sorted(images.iterdir())[:2]:
            shutil.copy(image, folder / "val" / images.name)
    convert = ("data_prep/convert.py", "--source", folder / "val", "--out", folder / "val.beton")
    made = run(sys.executable, *convert)
    assert made.returncode == 0, made.stderr
    starts = {"finetune": ("deit_base", 64), "deit3_large_finetune": ("deit3_large", 48)}
    for name, (model, size) in starts.items():
        small = {"num_classes": 10, "img_size": size, **SMALL_VIT}
        plain = timm.create_model(f"{model}_patch16_224", **small)
        torch.save({"model": plain.state_dict()}, folder / f"{name}.pth")
    ds_config = json.loads(recipe("vit_22b_k").train.deepspeed.read_text())
    assert ds_config["zero_optimization"]["zero_hpz_partition_size"] == 8
    ds_config["zero_optimization"]["zero_hpz_partition_size"] = 2  # all ranks here
    (folder / "hpz.json").write_text(json.dumps(ds_config))
    teacher = timm.create_model(TEACHER, num_classes=10)
    torch.save({"model": teacher.state_dict()}, folder / "teacher.pth")

    trainings = [
        (overrides(name, folder, digits), "never", str(path)) for name, path in RECIPES.items()
    ]
    Ranks(folder, 2, trainings).succeed(1800)
    return folder


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Section.key -> value."""
    found = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and above + key not in REDUCED
        found |= flat(value, f"{above}{key}.") if nested else {above + key: value}
    return found


@pytest.mark.dist
@pytest.mark.slow
@every_recipe
def test_it_trains(name: str, trained: Path) -> None:
    config = recipe(name)
    folder = trained / config.name
    steps = rows(folder, "train")
    assert [row["update"] for row in steps] == [1, UPDATES]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert rows(folder, "eval")[-1]["images"] == 20

    expected, got = (flat(c.model_dump()) for c in (config, load_config(folder / "config.yaml")))
    assert expected.keys() == got.keys()
    assert {key for key in expected if expected[key] != got[key]} <= REDUCED

    weights, average = tensors(folder, "weights", UPDATES), tensors(folder, "ema", UPDATES)
    if config.train.ema_decay is None:
        assert not average
        return
    assert weights.keys() == average.keys()
    assert any(not torch.equal(weights[key], average[key]) for key in weights)
    for key, weight in weights.items():
        torch.testing.assert_close(average[key], weight, rtol=0, atol=1e-4)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "deit3_large_finetune"])
def test_fine_tuning_starts_from_plain_weights_and_zero_tables(name: str, trained: Path) -> None:
    weights = tensors(trained / recipe(name).name, "weights", UPDATES)
    plain = torch.load(trained / f"{name}.pth")["model"]
    tables = {key for key in weights if "lookup_table" in key}
    assert weights.keys() == plain.keys() | tables
    assert len(tables) == 2
    for key, weight in weights.items():
        if key != "pos_embed":  # which is interpolated
            start = torch.zeros_like(weight) if key in tables else plain[key]
            torch.testing.assert_close(weight, start, rtol=0, atol=1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_the_teacher_is_heard(trained: Path) -> None:
    """The same student and images: only what the teacher says makes the losses differ."""
    kinds = ("hard", "soft")
    hard, soft = (rows(trained / f"distill-{kind}", "train")[0]["loss"] for kind in kinds)
    assert hard == pytest.approx(math.log(10), abs=0.3)
    assert soft == pytest.approx(math.log(10) / 2, abs=0.3)  # DeiT's divergence is of a small scale
    for kind in kinds:
        moments = tensors(trained / f"distill-{kind}", "exp_avg", UPDATES)
        assert moments["head_dist.weight"].any()
