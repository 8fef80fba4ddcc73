"""equip: timm's vision transformers of every family carry the encoding, or say why they cannot."""

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor

from irpe_ds import equip
from irpe_ds.errors import ConfigError
from irpe_ds.models import RPEAttention
from irpe_ds.models.positions import Positions
from irpe_ds.models.vision_transformer import last_block_is_inert
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig

NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "DeiT": ("deit_tiny_patch16_224", {"img_size": 64}),
    "DeiT, distilled: two prefix tokens": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "DeiT III: class token without position": ("deit3_small_patch16_224", {"img_size": 64}),
    "DINOv2: registers, layer scale": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "CLIP: norm before the blocks": ("vit_base_patch32_clip_224", {"img_size": 128}),
    "SigLIP: no class token, map pooling": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "average pooling, no class token": ("vit_base_patch16_gap_224", {"img_size": 64}),
    "FlexiViT": ("flexivit_small", {"img_size": 64}),
    "EVA": ("eva_large_patch14_196", {"img_size": 56}),
    "BEiT-3: norm after attention": ("beit3_base_patch16_224", {"img_size": 64}),
    "register without class token": ("test_vit3", {"img_size": 64}),
    "queries and keys normalised": ("deit_tiny_patch16_224", {"img_size": 64, "qk_norm": True}),
    "not square": ("deit_tiny_patch16_224", {"img_size": (48, 80)}),
    "features of every token": (
        "deit_tiny_patch16_224",
        {"img_size": 64, "num_classes": 0, "global_pool": ""},
    ),
}
ENCODINGS = [
    RPEConfig(),
    RPEConfig(on="qkv", shared_heads=False),
    RPEConfig(method="cross", mode="bias", on="qk", ratio=20),
    RPEConfig(method="euclidean", on="v", ratio=20),
]

Create = Callable[..., VisionTransformer]


@pytest.fixture
def create() -> Create:
    """Build a small timm model in evaluation mode, every weight of which counts."""

    def create(name: str = "deit_tiny_patch16_224", **options: Any) -> VisionTransformer:
        model = timm.create_model(name, **{**NARROW, "img_size": 64, **options}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
        for block in model.blocks:
            if isinstance(getattr(block, "attn", None), Attention):
                block.attn.fused_attn = False  # timm's eager path, to compare bit for bit
        return model

    return create


def image_for(model: VisionTransformer, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def tables_of(model: VisionTransformer) -> dict[str, Tensor]:
    return {key: p for key, p in model.named_parameters() if "lookup_table" in key}


def maps_of(model: VisionTransformer) -> list[BucketMap]:
    return [module for module in model.modules() if isinstance(module, BucketMap)]


def move_tables(model: VisionTransformer) -> None:
    for table in tables_of(model).values():
        torch.nn.init.normal_(table)


class TestFamilies:
    @pytest.mark.parametrize("rpe", ENCODINGS, ids=lambda rpe: f"{rpe.method}-{rpe.on}")
    @pytest.mark.parametrize(("name", "options"), FAMILIES.values(), ids=FAMILIES)
    def test_unchanged_until_the_tables_move(
        self, name: str, options: dict[str, Any], rpe: RPEConfig, create: Create
    ) -> None:
        model = create(name, **options)
        image, keys = image_for(model), set(model.state_dict())
        with torch.no_grad():
            before = model(image)
            assert equip(model, rpe, "reference") is model
            assert torch.equal(model(image), before)
            move_tables(model)
            assert not torch.allclose(model(image), before, atol=1e-4)

        added = set(model.state_dict()) - keys
        assert added == set(tables_of(model))
        assert len(added) == 2 * len(rpe.on) * (2 if rpe.method == "cross" else 1)
        assert len(maps_of(model)) == (2 if rpe.method == "cross" else 1)  # shared by both blocks
        assert maps_of(model)[0].skip == model.num_prefix_tokens
        assert maps_of(model)[0].grid == model.patch_embed.grid_size

    @pytest.mark.parametrize("rpe", ENCODINGS, ids=lambda rpe: f"{rpe.method}-{rpe.on}")
    @pytest.mark.parametrize(("name", "options"), FAMILIES.values(), ids=FAMILIES)
    def test_every_table_learns(
        self, name: str, options: dict[str, Any], rpe: RPEConfig, create: Create
    ) -> None:
        model = equip(create(name, **options), rpe).train()
        features = model.forward_features(image_for(model))
        (features * torch.randn_like(features)).sum().backward()
        for key, table in tables_of(model).items():
            assert table.grad.abs().max() > 1e-4, key

    def test_keys_are_those_of_the_released_checkpoints(self, create: Create) -> None:
        assert list(tables_of(equip(create(), RPEConfig(method="cross", on="kv")))) == [
            f"blocks.{n}.attn.rpe_{target}.rp_{axis}.lookup_table_weight"
            for n in (0, 1)
            for target in "kv"
            for axis in ("rows", "cols")
        ]

    def test_the_default_implementation_agrees(self, create: Create) -> None:
        model = create()
        image = image_for(model)
        with torch.no_grad():
            before = model(image)
            torch.testing.assert_close(equip(model, RPEConfig(on="qkv"))(image), before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_tables_follow_the_model(self, dtype: torch.dtype, create: Create) -> None:
        model = equip(create().to(dtype), RPEConfig(on="qkv"))
        assert all(table.dtype == dtype for table in tables_of(model).values())
        assert model(image_for(model).to(dtype)).dtype == dtype

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = equip(timm.create_model("deit_tiny_patch16_224", depth=2), RPEConfig())
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        assert maps_of(model)[0].ids.is_meta

    def test_materialised_from_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = equip(timm.create_model("deit_tiny_patch16_224", depth=2), RPEConfig())
        model.to_empty(device="cpu")
        for module in model.modules():  # whatever the allocator left there
            for tensor in (*module.parameters(False), *module.buffers(False)):
                tensor.data.fill_(1)
        model.init_weights()
        assert not any(table.any() for table in tables_of(model).values())
        assert torch.equal(maps_of(model)[0].ids, BucketMap.build("product", 14, 14, 1).ids)

    def test_training_mode_is_kept(self, create: Create) -> None:
        model = create()
        model.blocks[1].train()
        equip(model, RPEConfig())
        assert [block.attn.training for block in model.blocks] == [False, True]


class TestLastBlock:
    @pytest.mark.parametrize("mode", ["contextual", "bias"])
    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
    def test_what_a_class_token_leaves_of_its_tables(
        self, name: str, mode: str, create: Create
    ) -> None:
        """On keys nothing, on queries and values the bucket of the prefix tokens."""
        on = "qkv" if mode == "contextual" else "qk"
        model = equip(create(name, img_size=48).double(), RPEConfig(mode=mode, on=on), "reference")
        assert last_block_is_inert(model)
        move_tables(model)
        logits = model(image_for(model, batch=2).double())
        (logits * torch.randn_like(logits)).sum().backward()
        for key, table in tables_of(model).items():
            target = key.split("rpe_")[1][0]
            last = table.grad[:, -1] if target == "v" else table.grad[..., -1]
            others = table.grad[:, :-1] if target == "v" else table.grad[..., :-1]
            is_last_block = key.startswith("blocks.1")
            assert (others.abs().max() > 1e-3) != is_last_block, key
            learns = not is_last_block or (mode == "contextual" and target != "k")
            assert (last.abs().max() > 1e-3) == learns, key
            assert learns or table.grad.abs().max() < 1e-12, key

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("deit_tiny_patch16_224", {"global_pool": "avg"}),
            ("deit_tiny_patch16_224", {"num_classes": 0, "global_pool": ""}),
            ("vit_base_patch16_siglip_224", {}),
        ],
    )
    def test_is_not_inert_where_patches_are_read(
        self, name: str, options: dict[str, Any], create: Create
    ) -> None:
        assert not last_block_is_inert(equip(create(name, **options), RPEConfig()))

    def test_left_out(self, create: Create) -> None:
        model = create()
        image, rpe = image_for(model), RPEConfig(last_block=False)
        with torch.no_grad():
            before = model(image)
            assert torch.equal(equip(model, rpe, "reference")(image), before)
        assert list(tables_of(model)) == ["blocks.0.attn.rpe_k.lookup_table_weight"]
        assert not last_block_is_inert(model)
        assert Positions.of(model).encoding == rpe
        with pytest.raises(ConfigError, match="two blocks or more without last_block, got 1"):
            equip(create(depth=1), rpe)


def copied_by_pickle(model: VisionTransformer) -> VisionTransformer:
    return pickle.loads(pickle.dumps(model))


def saved_tables(model: VisionTransformer) -> dict[str, Tensor]:
    return {key: table.detach().clone() for key, table in tables_of(model).items()}


class TestInputSize:
    @pytest.mark.parametrize("rpe", ENCODINGS, ids=lambda rpe: f"{rpe.method}-{rpe.on}")
    def test_maps_follow_the_grid_and_tables_stay(self, rpe: RPEConfig, create: Create) -> None:
        model = equip(create(), rpe, "reference")
        move_tables(model)
        before = saved_tables(model)
        model.set_input_size((48, 96))
        torch.testing.assert_close(tables_of(model), before, rtol=0, atol=0)

        same = equip(create(img_size=(48, 96)), rpe, "reference")
        same.load_state_dict(model.state_dict())
        image = image_for(same)
        with torch.no_grad():
            assert torch.equal(model(image), same(image))
        assert len(maps_of(model)) == (2 if rpe.method == "cross" else 1)

    def test_of_the_patches(self, create: Create) -> None:
        model = equip(create(), RPEConfig())
        model.set_input_size(img_size=(64, 64), patch_size=(8, 8))
        assert maps_of(model)[0].grid == (8, 8)
        assert model(image_for(model)).shape == (2, 1000)

    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            copied_by_pickle,
        ],
        ids=["deepcopy", "pickle"],
    )
    def test_a_copy_has_its_own(self, copied: Callable, create: Create) -> None:
        """To 2 x 8 patches: as many tokens as 4 x 4, so that only the buckets can tell."""
        model = equip(create(), RPEConfig(on="qk"))
        move_tables(model)
        image = image_for(model)
        with torch.no_grad():
            before = model(image)
            twin = copied(model)
            assert torch.equal(twin(image), before)
            twin.set_input_size((32, 128))
            assert [buckets.grid for buckets in maps_of(twin)] == [(2, 8)]
            assert [buckets.grid for buckets in maps_of(model)] == [(4, 4)]
            assert torch.equal(model(image), before)

    def test_a_copy_shares_nothing_with_its_model(self, create: Create) -> None:
        model = equip(create(), RPEConfig())
        twin = copy.deepcopy(model)
        move_tables(twin)
        assert not any(table.any() for table in tables_of(model).values())
        assert len(maps_of(twin)) == 1
        assert maps_of(twin)[0] is not maps_of(model)[0]

    def test_another_size_at_the_forward_is_an_error(self, create: Create) -> None:
        attention = equip(create(), RPEConfig()).blocks[0].attn
        with pytest.raises(
            ConfigError, match=r"^rpe_k\[0\]: expected 17 tokens \(4x4 patches \+ 1"
        ):
            attention(torch.randn(2, 26, 48))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "not a transformer": ("resnet18", {}, "ResNet"),
    "another transformer": ("swin_tiny_patch4_window7_224", {}, "SwinTransformer"),
    "blocks of another kind": (
        "deit_tiny_patch16_224",
        {"block_fn": ParallelScalingBlock},
        "ParallelScalingBlock in blocks.0",
    ),
    "attention of another kind": (
        "deit_tiny_patch16_224",
        {"attn_layer": "diff"},
        "DiffAttention in blocks.0",
    ),
    "patches dropped": ("deit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate=0.5"),
    "patches dropped by EVA": ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.5}, "=0.5"),
    "biases shared by all blocks": (
        "beit_base_patch16_224",
        {"use_shared_rel_pos_bias": True},
        "use_shared_rel_pos_bias",
    ),
    "encoded already": (
        "deit_tiny_patch16_224_ctx_product_50_shared_k",
        {},
        "VisionTransformer with it",
    ),
}


class TestRefused:
    @pytest.mark.parametrize(("name", "options", "got"), REFUSED.values(), ids=REFUSED)
    def test_says_why(self, name: str, options: dict[str, Any], got: str) -> None:
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        keys = list(model.state_dict())
        with pytest.raises(ConfigError, match=r"^equip: expected .*, got ") as caught:
            equip(model, RPEConfig())
        assert got in str(caught.value.got)
        assert list(model.state_dict()) == keys

    def test_an_unknown_implementation_changes_nothing(self, create: Create) -> None:
        model = create()
        with pytest.raises(ConfigError, match=r"^impl: expected auto"):
            equip(model, RPEConfig(), "fast")
        assert not any(isinstance(block.attn, RPEAttention) for block in model.blocks)


class TestAttention:
    @pytest.fixture
    def attention(self) -> Attention:
        """timm's attention with everything that it can have, no weight of it trivial."""
        attention = Attention(
            48,
            num_heads=3,
            qkv_bias=True,
            qk_norm=True,
            scale_norm=True,
            **({"gated": True} if "gated" in signature(Attention).parameters else {}),  # newer timm
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter)
        attention.fused_attn = False
        return attention.eval()

    @pytest.fixture
    def maps(self) -> tuple[BucketMap, ...]:
        return (BucketMap.build("product", 2, 3, 1),)

    def test_equals_timm_s(self, attention: Attention, maps: tuple[BucketMap, ...]) -> None:
        x = torch.randn(2, 7, 48)
        with torch.no_grad():
            expected = attention(x)
            ours = RPEAttention(attention, RPEConfig(on="qkv"), maps, "reference")
            assert torch.equal(ours(x), expected)

    def test_a_mask_of_keys(self, attention: Attention, maps: tuple[BucketMap, ...]) -> None:
        x, mask = torch.randn(2, 7, 48), torch.rand(2, 1, 1, 7) < 0.5
        mask[..., 0] = True
        with torch.no_grad():
            expected = attention(x, attn_mask=mask)
            ours = RPEAttention(attention, RPEConfig(on="qkv"), maps)
            torch.testing.assert_close(ours(x, attn_mask=mask), expected)

    @pytest.mark.parametrize(
        ("mask", "got"),
        [
            ({"attn_mask": torch.zeros(2, 1, 1, 7)}, "float32 (2, 1, 1, 7)"),
            ({"attn_mask": torch.ones(7, 7, dtype=torch.bool)}, "bool (7, 7)"),
            ({"is_causal": True}, "is_causal=True"),
        ],
        ids=["floating", "pairs", "causal"],
    )
    def test_refuses_another_mask(
        self, mask: dict[str, Any], got: str, attention: Attention, maps: tuple[BucketMap, ...]
    ) -> None:
        expected = "attn_mask: expected a bool mask of keys (2, 1, 1, 7), True for those that take"
        with pytest.raises(
            ConfigError, match=f"^{re.escape(expected)} part, got {re.escape(got)}$"
        ):
            RPEAttention(attention, RPEConfig(), maps)(torch.randn(2, 7, 48), **mask)

    @pytest.mark.parametrize("name", ["attn_drop", "proj_drop"])
    def test_drops_in_training_only(
        self, name: str, attention: Attention, maps: tuple[BucketMap, ...]
    ) -> None:
        getattr(attention, name).p = 0.5
        ours, x = RPEAttention(attention, RPEConfig(), maps), torch.randn(2, 7, 48)
        assert torch.equal(ours(x), ours(x))
        ours.train()
        assert not torch.equal(ours(x), ours(x))

    def test_autocast_with_norms_in_float32(
        self, attention: Attention, maps: tuple[BucketMap, ...]
    ) -> None:
        """As on CUDA, where autocast runs a LayerNorm in float32; timm's attention takes it."""
        for norm in (attention.q_norm, attention.k_norm):
            norm.register_forward_hook(lambda module, args, out: out.float())
        x = torch.randn(2, 7, 48)
        with torch.autocast("cpu", torch.bfloat16):
            expected = attention(x)
            out = RPEAttention(attention, RPEConfig(), maps)(x)
        torch.testing.assert_close(out, expected, atol=0.5, rtol=0.1)
