"""timm's VisionTransformer with relative position in every block."""

from functools import partial
from typing import Any, cast

from timm.layers import Attention, PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.ops.dispatch import check_name
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import RPETable, build_maps


def equip(model: nn.Module, rpe: RPEConfig, impl: str = "auto") -> VisionTransformer:
    """Add zero-initialised relative position tables to the blocks, in place.

    Works on any timm VisionTransformer whose blocks use timm's `Attention`: DeiT, DINOv2 with
    registers, CLIP, SigLIP, with or without class token. Logits are unchanged until training
    updates the tables. `model.set_input_size` still works: the bucket maps follow the grid. A model
    with dynamic_img_size takes one size at a time, chosen by `set_resolution`.

    Args:
        impl: implementation of the op, as in `irpe_attention`.

    Returns:
        The same model.

    Raises:
        ConfigError: the model is not supported; the message says why.
    """
    vit = _checked(model)
    check_name(impl)
    maps = _maps(vit, rpe)
    blocks = vit.blocks if rpe.last_block else vit.blocks[:-1]
    if not blocks:
        raise ConfigError("equip", "two blocks or more without last_block", len(vit.blocks))
    for block in blocks:
        block.attn = RPEAttention(cast(Attention, block.attn), rpe, maps, impl)
    vit.set_input_size = partial(_set_input_size, vit, rpe)  # type: ignore[method-assign]
    return vit


def last_block_is_inert(model: nn.Module) -> bool:
    """Whether tables in the last block are (nearly) without effect: the classifier reads class
    tokens alone.

    It needs row i of class tokens only, in which every key j has the one bucket b of the prefix
    tokens. What a table T adds there:

    - on k, q_i . T[b], or in bias mode on q and k, T[b]: the same to every logit of the row, which
      softmax ignores. No effect, and a gradient of zero.
    - on q, k_j . T[b]; on v, sum_j a_ij T[b] = T[b]: gradients of one bucket.
    """
    if not isinstance(model, VisionTransformer) or not isinstance(
        getattr(model.blocks[-1], "attn", None), RPEAttention
    ):
        return False
    return model.global_pool == "token" and model.attn_pool is None


def set_resolution(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Prepare a model with dynamic_img_size for another input size; parameters stay the same.

    Relative position tables get the bucket maps of the new grid; timm interpolates the position
    embedding in every forward pass. Other models are not changed.

    Raises:
        ConfigError: the size is not a multiple of the patch size.
    """
    if not isinstance(model, VisionTransformer) or not model.dynamic_img_size:
        return
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = model.patch_embed.patch_size
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ConfigError("img_size", f"multiples of the patch size {patch}", size)
    grid = size[0] // patch[0], size[1] // patch[1]
    maps: dict[str, BucketMap] = {}  # shared by all layers
    for module in model.modules():
        if isinstance(module, RPETable) and module.buckets.grid != grid:
            old = module.buckets
            if old.method not in maps:
                new = BucketMap.build(old.method, *grid, old.skip, old.ratio)
                maps[old.method] = new.to(old.ids.device)
            module.buckets = maps[old.method]


def _set_input_size(model: VisionTransformer, rpe: RPEConfig, *args: Any, **kwargs: Any) -> None:
    """timm's set_input_size, then the bucket maps of the new grid for every table."""
    type(model).set_input_size(model, *args, **kwargs)
    by_method = {buckets.method: buckets for buckets in _maps(model, rpe)}
    for module in model.modules():
        if isinstance(module, RPETable):
            module.buckets = by_method[module.buckets.method]


def _checked(model: nn.Module) -> VisionTransformer:
    expected = "a timm VisionTransformer with timm's Attention in every block"
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ConfigError("equip", expected, name)
    if isinstance(model.patch_drop, PatchDropout):
        raise ConfigError("equip", "a model that keeps every patch", "patch_drop_rate > 0")
    for number, block in enumerate(model.blocks):
        attention = getattr(block, "attn", block)
        if isinstance(attention, RPEAttention):
            raise ConfigError("equip", "a model without relative position", f"{name} with it")
        if type(attention) is not Attention:
            got = f"{type(attention).__name__} in blocks.{number} of {name}"
            raise ConfigError("equip", expected, got)
    return model


def _maps(model: VisionTransformer, rpe: RPEConfig) -> tuple[BucketMap, ...]:
    """The bucket maps of the model's current grid, on its device."""
    height, width = model.patch_embed.grid_size
    device = next(model.parameters()).device
    maps = build_maps(rpe, height, width, model.num_prefix_tokens)
    return tuple(buckets.to(device) for buckets in maps)
