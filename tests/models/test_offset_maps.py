"""What relative position adds as a function of the offset, from tables whose maps are known."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from irpe_ds import RPEConfig, equip
from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.models.offset_maps import offset_ids, offset_maps, targets
from irpe_ds.rpe.buckets import BucketMap

HEIGHT, WIDTH, HEADS, DIM = 3, 4, 2, 8
METHODS = ("product", "cross", "euclidean", "quantization")
ROWS, COLS = torch.arange(1 - HEIGHT, HEIGHT)[:, None], torch.arange(1 - WIDTH, WIDTH)


def vit(rpe: RPEConfig, **options: object) -> VisionTransformer:
    size = {"img_size": (4 * HEIGHT, 4 * WIDTH), "patch_size": 4, "embed_dim": HEADS * DIM}
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_heads=HEADS, **size, **options
    ).eval()
    return equip(model, rpe, impl="reference")


def fill(model: VisionTransformer) -> None:
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            torch.nn.init.normal_(parameter)


def images() -> Tensor:
    return torch.randn(3, 3, 4 * HEIGHT, 4 * WIDTH)


def no_images() -> Tensor:
    raise AssertionError("this needs no images")


def pairs(map_: Tensor) -> Tensor:
    """A map (Y, X) spread over all pairs of patches, (query, key)."""
    row = torch.arange(HEIGHT).repeat_interleave(WIDTH)
    col = torch.arange(WIDTH).repeat(HEIGHT)
    return map_[
        row - row[:, None] + HEIGHT - 1,
        col - col[:, None] + WIDTH - 1,
    ]


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("method", ["product", "euclidean", "cross_rows", "cross_cols"])
def test_every_pair_of_patches_has_the_bucket_of_its_offset(method: str, skip: int) -> None:
    buckets = BucketMap.build(method, HEIGHT, WIDTH, skip)
    assert torch.equal(pairs(offset_ids(buckets)), buckets.ids[skip:, skip:].long())


@pytest.mark.parametrize("on", ["k", "q"])
@pytest.mark.parametrize("shared_heads", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_bias_is_what_the_logits_get(method: str, shared_heads: bool, on: str) -> None:
    model = vit(RPEConfig(method=method, mode="bias", on=on, shared_heads=shared_heads))
    fill(model)
    for block, found in zip(model.blocks, offset_maps(model, on, no_images), strict=True):
        assert found.shape == (1 if shared_heads else HEADS, *(ROWS + COLS).shape)
        terms = getattr(block.attn, f"rpe_{on}").terms()
        logits = sum(table[:, buckets.ids] for table, buckets in terms)
        logits = logits.transpose(1, 2) if on == "q" else logits  # b(j, i)
        for map_, expected in zip(found, logits[:, 1:, 1:], strict=True):
            torch.testing.assert_close(pairs(map_), expected)


@pytest.mark.parametrize("on", ["k", "q"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_contextual_is_the_mean_of_what_the_logits_get(method: str, qk_norm: bool, on: str) -> None:
    model = vit(RPEConfig(method=method, on=on), qk_norm=qk_norm)
    fill(model)
    batch, inputs = images(), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    found = offset_maps(model, on, lambda: batch)
    for block, x_BLC, map_HYX in zip(model.blocks, inputs, found, strict=True):
        attention: RPEAttention = block.attn
        q, k, _ = attention.qkv(x_BLC).reshape(3, -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        vector = attention.q_norm(q) if on == "k" else attention.k_norm(k)
        sign = 1 if on == "k" else -1  # b(j, i)
        for row, col in ((-2, -3), (0, 0), (1, 2), (0, -1), (2, 0)):
            logits_BHL = sum(
                vector * DIM**-0.5 @ table[0, :, offset_id(buckets, sign * row, sign * col)]
                for table, buckets in getattr(attention, f"rpe_{on}").terms()
            )
            got = map_HYX[:, row + HEIGHT - 1, col + WIDTH - 1]
            torch.testing.assert_close(got, logits_BHL[:, :, 1:].mean((0, 2)))


@pytest.mark.parametrize("on", ["k", "q"])
def test_contextual_is_of_what_is_rotated(on: str) -> None:
    """Grouped queries too: the maps are those of queries and keys that the op gets."""
    size = {"img_size": (4 * HEIGHT, 4 * WIDTH), "patch_size": 4, "embed_dim": HEADS * DIM}
    grouped = {"num_heads": HEADS, "num_kv_heads": 1, "depth": 1}
    model = timm.create_model("vit_base_patch16_sapiens2", **size, **grouped).eval()
    equip(model, RPEConfig(on=on, shared_heads=False), "reference")
    fill(model)
    attention, batch, inputs = model.blocks[0].attn, images(), []
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((*args, kwargs["rope"])), with_kwargs=True
    )
    (found,) = offset_maps(model, on, lambda: batch)
    q, k, _ = attention.project(*inputs[0])
    patches = (q if on == "k" else k)[:, :, model.num_prefix_tokens :]
    table, buckets = getattr(attention, f"rpe_{on}").terms()[0]
    vectors = patches.mean((0, 2)) * DIM**-0.5  # (H, D)
    expected = torch.einsum("hd,hdn->hn", vectors, table)[:, offset_ids(buckets)]
    torch.testing.assert_close(found, expected.flip(1, 2) if on == "q" else expected)


def offset_id(buckets: BucketMap, row: int, col: int) -> int:
    """The bucket of a key so many rows below and columns right of the query, by search."""
    for query in range(HEIGHT * WIDTH):
        y, x = query // WIDTH + row, query % WIDTH + col
        if 0 <= y < HEIGHT and 0 <= x < WIDTH:
            return int(buckets.ids[query + 1, y * WIDTH + x + 1])
    raise AssertionError("no such offset on the grid")


def test_table_of_columns_gives_a_map_of_columns() -> None:
    model = vit(RPEConfig(method="cross", mode="bias", on="k", ratio=1.9))
    cols = model.blocks[0].attn.rpe_k.rp_cols
    with torch.no_grad():
        cols.lookup_table_bias[0, :7] = -torch.arange(-3.0, 4.0)  # buckets of query - key
    first, second = offset_maps(model, "k", no_images)
    expected = torch.tensor([-2.0, -2, -1, 0, 1, 2, 2])  # 3 columns share the bucket of 2
    assert torch.equal(first[0], expected.expand(5, 7))
    assert not second.any()


def test_values_have_the_length_of_the_added_vector() -> None:
    model = vit(RPEConfig(method="cross", on="kv", shared_heads=False))
    fill(model)
    found = offset_maps(model, "v", no_images)[1]
    rows, cols = (table for table, _ in model.blocks[1].attn.rpe_v.terms())
    (_, row_buckets), (_, col_buckets) = model.blocks[1].attn.rpe_v.terms()
    added = rows[:, offset_id(row_buckets, -1, 2)] + cols[:, offset_id(col_buckets, -1, 2)]
    torch.testing.assert_close(found[:, HEIGHT - 2, WIDTH + 1], added.norm(dim=-1))


def test_the_model_is_left_as_it_was() -> None:
    model = vit(RPEConfig())
    offset_maps(model, "k", images)
    assert not any(module._forward_hooks for module in model.modules())


def test_only_targets_with_tables() -> None:
    model = vit(RPEConfig(on="qv"))
    assert targets(model) == "qv"
    assert targets(timm.create_model("vit_tiny_patch16_224", depth=1)) == ""
    with pytest.raises(ConfigError, match="target: expected one of q, v, got 'k'"):
        offset_maps(model, "k", no_images)
    with pytest.raises(ConfigError, match="got 'qv'"):
        offset_maps(model, "qv", no_images)
