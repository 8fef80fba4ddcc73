"""Any timm model can be counted; what cannot says so in a line."""

from typing import Any
from unittest import mock

import pytest

from irpe_ds.config import RunConfig, load_config
from irpe_ds.errors import ConfigError
from irpe_ds.planner import profile as module
from irpe_ds.planner.profile import profile
from tests.planner.conftest import QUICKSTART

SHALLOW = "model.options={depth: 1}"


def config(name: str, size: int = 224, *changes: str) -> RunConfig:
    of_model = [f"model.name={name}", f"model.img_size={size}", "model.rpe=null"]
    return load_config(QUICKSTART, [*of_model, "model.options={}", *changes])


@pytest.mark.parametrize(
    "name",
    [
        "beit_base_patch16_224",
        "vit_relpos_small_patch16_224",
        "cait_xxs24_224",
        "samvit_base_patch16_224",
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
    ],
)
def test_attention_of_many_kinds(name: str) -> None:
    found = profile(config(name, 224, SHALLOW))
    assert found.flops > 0
    assert found.saved > 0
    assert found.traffic[1] > found.traffic[0] > 0


def test_a_convolutional_model() -> None:
    assert profile(config("levit_128s")).saved > 0


def test_fused_attention_saves_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = config("vit_tiny_patch16_224", 224, SHALLOW)
    fused = profile(tiny)
    monkeypatch.setattr("timm.layers.attention.use_fused_attn", lambda: False)
    scores = 3 * 197 * 197 * 2  # bytes of the one layer's, in bf16
    assert profile(tiny).saved - fused.saved > 0.9 * scores


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("eva02_tiny_patch14_224", "fused"),
        ("vit_small_patch16_dinov3", "fused"),
        ("qwen3_vit_88m", "fused"),
        ("beit_base_patch16_224", "gather"),
    ],
)
def test_relative_position_in_many_families(name: str, impl: str) -> None:
    plain = profile(config(name, 224, SHALLOW))
    found = profile(config(name, 224, SHALLOW, "model.rpe={on: k}"))
    assert found.impl == impl
    assert found.numel - plain.numel == 64 * (49 + (name != "qwen3_vit_88m"))
    assert found.flops > plain.flops


def test_what_cannot_run_is_one_line() -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("reads a number\nand more")

    with (
        mock.patch.object(module, "_call", fails),
        pytest.raises(ConfigError) as error,
    ):
        profile(config("vit_tiny_patch16_224", 224, SHALLOW))
    assert error.value.where == "model.name"
    assert error.value.got == "vit_tiny_patch16_224: RuntimeError: reads a number"


def test_kernels_of_the_input() -> None:
    """RandAugment's 226 and erasing's 21, of DeiT's recipe, among them."""
    off = ("augment.auto=null", "augment.erase=0", "augment.mixup=0", "augment.cutmix=0")
    recipe = ("augment.auto=rand-m9-mstd0.5-inc1", "augment.erase=0.25")
    normalized, augmented = (
        module._input_kernels(config("vit_tiny_patch16_224", 224, *changes))
        for changes in (off, (*off, *recipe))
    )
    assert normalized <= 5
    assert 230 < augmented - normalized <= 255


def test_what_is_frozen_saves_nothing() -> None:
    whole, half, head = (
        profile(load_config(QUICKSTART, [f"model.freeze={what}"]))
        for what in ("0", "2", '["*", "!head"]')
    )
    assert [p.name for p in head.trained] == ["head.weight", "head.bias"]
    assert len(half.parameters) == len(whole.parameters) == len(whole.trained)
    assert not any(p.name.startswith(("patch", "blocks.0", "blocks.1")) for p in half.trained)
    assert head.saved < 0.05 * whole.saved
    assert half.saved == pytest.approx(whole.saved / 2, rel=0.1)
    assert head.traffic[0] == half.traffic[0] == whole.traffic[0]
    assert head.traffic[1] < half.traffic[1] < whole.traffic[1]
