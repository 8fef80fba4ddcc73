"""The recipes of launch/configs/imagenet: the published numbers, and every one of them trains."""

from pathlib import Path

import pytest

from irpe_ds.config import AugmentConfig, OptimConfig, RunConfig, TrainConfig, load_config
from irpe_ds.models.zoo import ZOO

RECIPES = {
    path.stem: path
    for path in sorted(Path("launch/configs/imagenet").glob("*.yaml"))
    if path.stem != "deit"  # not a run by itself
}
PLAIN = {f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
OTHERS = {"finetune", "distill_hard", "distill_soft"}
MODELS = sorted(RECIPES.keys() - OTHERS)
every_recipe = pytest.mark.parametrize("name", RECIPES)


def recipe(name: str) -> RunConfig:
    return load_config(RECIPES[name])


def test_there_is_one_for_every_model_of_the_zoo_and_plain_deit() -> None:
    names = [recipe(name).model.name for name in MODELS]
    assert sorted(names) == sorted(PLAIN | ZOO.keys())


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
    assert (config.model.drop_path, config.model.img_size) == (0.1, 224)
    assert (config.model.rpe, config.model.weights, config.distill.kind) == (None, None, "none")
    assert (config.data.val_crop, config.data.pipeline) == (0.875, "ffcv")


def test_fine_tuning_has_deits_numbers() -> None:
    config = recipe("finetune")
    optim = config.optim
    assert (optim.lr, optim.lr_batch, optim.min_lr) == (5e-6, 512, 5e-6)
    assert (optim.weight_decay, optim.warmup_epochs, optim.warmup_lr) == (1e-8, 5, 1e-6)
    assert (config.train.epochs, config.train.global_batch) == (30, 512)
    assert config.model.img_size == 384
    assert config.augment == recipe("deit_base_k").augment


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_has_deits_numbers(kind: str) -> None:
    config = recipe(f"distill_{kind}")
    distill = config.distill
    assert (distill.kind, distill.teacher) == (kind, "regnety_160")
    assert (distill.alpha, distill.tau) == (0.5, 1.0)
    assert (config.augment, config.optim) == (recipe("deit_small").augment, OptimConfig())


@every_recipe
def test_its_header_says_how_and_what(name: str) -> None:
    header = RECIPES[name].read_text().split("\nbase:")[0]
    assert f"#   deepspeed launch/train.py --config {RECIPES[name]}" in header.splitlines()
    assert "GPUs. Time and accuracy here: not yet run." in header
    row = ZOO.get(recipe(name).model.name)
    if name in MODELS and row is not None and row.top1:
        assert f"# Published: top-1 {row.top1} %, top-5 {row.top5} % (iRPE)." in header


def test_runs_do_not_share_a_folder() -> None:
    assert len({recipe(name).folder for name in RECIPES}) == len(RECIPES)
