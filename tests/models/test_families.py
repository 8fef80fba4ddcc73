"""Families of timm beside its VisionTransformer: rotary embeddings, biases of BEiT, any grid."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureGraphNet
from timm.models.beit import checkpoint_filter_fn
from torch import Tensor, nn

from irpe_ds import equip
from irpe_ds.errors import ConfigError
from irpe_ds.models.vision_transformer import check_resolution
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig

ON_QKV = RPEConfig(on="qkv", shared_heads=False)
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "EVA-02: three projections": ("eva02_base_patch14_224", {"img_size": 56}),
    "EVA-02: biases beside the projection": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "DINOv3: registers": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "rotary of each layer": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": (48, 80)}),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", {"img_size": 64}),
    "Sapiens2: grouped queries": (
        "vit_base_patch16_sapiens2",
        {"img_size": (64, 48), "num_kv_heads": (3, 1)},
    ),
    "BEiT v2: biases of its own": ("beitv2_base_patch16_224", {"img_size": (48, 80)}),
    "Qwen3: an encoder in a classifier": ("qwen3_vit_88m", {"img_size": 64}),
    "DeepSeek": ("deepseek_vit_412m", {"img_size": 56}),
}


def create(name: str, *, eager: bool = False, **options: Any) -> nn.Module:
    """A small model in evaluation mode, every weight of which counts."""
    model = timm.create_model(name, **{**NARROW, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    for module in model.modules() if eager else ():  # timm's own path, to compare bit for bit
        vars(module).update({"fused_attn": False, "qkv_bias_separate": True})
    return model


def images(model: Any, *size: int) -> Tensor:
    size = size or getattr(model, "encoder", model).patch_embed.img_size
    return torch.randn(2, 3, *size)


def tables_of(model: nn.Module) -> dict[str, Any]:
    return {key: p for key, p in model.named_parameters() if "lookup_table" in key}


def move_tables(model: nn.Module) -> None:
    for table in tables_of(model).values():
        nn.init.normal_(table)


@pytest.mark.parametrize(("name", "options"), FAMILIES.values(), ids=FAMILIES)
def test_unchanged_until_the_tables_move(name: str, options: dict[str, Any]) -> None:
    model = create(name, eager=True, **options)
    x, keys = images(model), set(model.state_dict())
    with torch.no_grad():
        before = model(x)
        equip(model, ON_QKV, "reference")
        assert torch.equal(model(x), before)
    (model.train()(x) * torch.randn(2, 7)).sum().backward()
    for key, table in tables_of(model).items():
        assert table.grad.any(), key
    move_tables(model.eval())
    assert not torch.allclose(model(x), before, atol=1e-4)
    assert set(model.state_dict()) - keys == set(tables_of(model))
    assert len(tables_of(model)) == 2 * 3


@pytest.mark.parametrize("impl", ["cpu", "gather"])
@pytest.mark.parametrize("rpe", [ON_QKV, RPEConfig(mode="bias", on="qk")], ids=lambda r: r.mode)
def test_the_operators_take_the_biases_of_beit(rpe: RPEConfig, impl: str) -> None:
    model = equip(create("beitv2_base_patch16_224", img_size=(48, 80)), rpe, "reference")
    move_tables(model)
    x, gradients = images(model), []
    for used in ("reference", impl):
        for block in model.blocks:
            block.attn.impl = used
        model.zero_grad()
        model(x).sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert any("relative_position_bias_table" in key for key in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_beit_on_another_grid() -> None:
    model = equip(create("beitv2_base_patch16_224", img_size=64), ON_QKV)
    move_tables(model)
    other = equip(create("beitv2_base_patch16_224", img_size=96), ON_QKV)
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    model.set_input_size((96, 96))
    x = images(other)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beitv2_base_patch16_224"])
def test_materialised_from_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = equip(timm.create_model(name, depth=1), ON_QKV)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(1)  # whatever the allocator left there
    model.init_weights()
    attention = model.blocks[0].attn
    assert not any(own.any() for own in attention.parameters(recurse=False))
    assert not attention.k_bias.any()
    fresh = equip(timm.create_model(name, depth=1), ON_QKV)
    for key, buckets in fresh.named_modules():
        if isinstance(buckets, BucketMap):
            assert torch.equal(model.get_submodule(key).ids, buckets.ids)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beitv2_base_patch16_224"])
def test_recorded_to_run_elsewhere(name: str) -> None:
    model = equip(create(name, img_size=64), ON_QKV)
    move_tables(model)
    x = images(model)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x.flip(2)), model(x.flip(2)))
    (features,) = FeatureGraphNet(model, out_indices=(1,))(x)
    (expected,) = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(features[:, model.num_prefix_tokens :], expected)


BY_FILE = {
    **{"vision_transformer": (163, 154), "vision_transformer_hybrid": (14, 14)},
    **{"vitamin": (13, 13), "deit": (16, 16), "eva": (65, 65), "beit": (7, 7)},
    **{"qwen3_vit": (9, 9), "deepseek_vit": (3, 3)},
}
"""Names of timm 1.0.31, and those that take the encoding: docs/operators.md has their sums."""


@pytest.mark.slow
def test_how_many_names_take_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (BucketMap.build("product", 1, 1),)
    monkeypatch.setattr("irpe_ds.models.vision_transformer.build_maps", lambda *_: small)
    counts, answers = {}, []
    for file in timm.list_modules():
        if not re.search("vit|deit|beit|eva|transformer", file):
            continue
        taken, names = 0, timm.list_models(module=file)
        for name in names if file in BY_FILE else names[:1]:
            with torch.device("meta"):
                model = timm.create_model(name)
                try:
                    taken += equip(model, RPEConfig(), "reference") is model
                except ConfigError as error:
                    answers.append(str(error))
        counts[file] = len(names), taken
    assert {file: count for file, count in counts.items() if count[1]} == BY_FILE
    assert [sum(each) for each in zip(*counts.values(), strict=True)] == [531, 281]
    assert all(
        re.match(r"equip: expected a timm ViT on one grid.*, got \w+( |$)", a) for a in answers
    )


class TestDynamicSize:
    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
    @pytest.mark.parametrize("method", ["product", "cross"])
    def test_is_that_of_a_model_made_for_the_size(self, name: str, method: str) -> None:
        rpe = RPEConfig(method=method, on="qkv")
        model = equip(create(name, img_size=64, dynamic_img_size=True), rpe)
        move_tables(model)
        for size in ((96, 64), (64, 64), (32, 128), (96, 64)):  # 4 x 4 and 2 x 8: as many tokens
            fixed = equip(create(name, img_size=64, dynamic_img_size=False), rpe)
            fixed.load_state_dict(model.state_dict())
            fixed.set_input_size(size)
            x = images(model, *size)
            with torch.no_grad():
                torch.testing.assert_close(model(x), fixed(x))

    def test_of_an_encoder(self) -> None:
        model = equip(create("qwen3_vit_88m", img_size=64), ON_QKV)
        move_tables(model)
        other = equip(create("qwen3_vit_88m", img_size=96), ON_QKV)
        other.load_state_dict(model.state_dict())
        x = images(other)
        torch.testing.assert_close(model(x), other(x))

    @pytest.mark.parametrize("through", [copy.deepcopy, nn.Module.float], ids=["copy", "itself"])
    def test_a_copy_has_its_own_grid(self, through: Callable[[nn.Module], Any]) -> None:
        model = equip(create("deit_tiny_patch16_224", img_size=64, dynamic_img_size=True), ON_QKV)
        twin = through(model)
        twin(images(model, 96, 96))
        grids = [m.blocks[1].attn.rpe_k.buckets.grid for m in (model, twin)]
        assert grids == [(6, 6) if twin is model else (4, 4), (6, 6)]

    def test_maps_of_few_grids_are_kept(self) -> None:
        model = equip(create("deit_tiny_patch16_224", img_size=64, dynamic_img_size=True), ON_QKV)
        (hook,) = model.patch_embed._forward_hooks.values()
        for columns in range(1, 20):
            model.patch_embed(images(model, 32, 16 * columns))
        assert [*hook.__self__.kept] == [(2, columns) for columns in range(4, 20)]

    def test_a_size_between_is_refused(self) -> None:
        model = create("deit_tiny_patch16_224", dynamic_img_size=True)
        with pytest.raises(ConfigError, match=r"multiples of the patch size \(16, 16\), got"):
            check_resolution(model, (96, 100))
