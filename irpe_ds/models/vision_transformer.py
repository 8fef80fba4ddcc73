"""timm's VisionTransformer carrying relative position in every block."""

from types import MethodType

from timm.layers import Attention, PatchDropout
from timm.models.vision_transformer import VisionTransformer

from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.ops import select
from irpe_ds.rpe import RPEConfig, RPETable, build_maps


def equip(
    model: VisionTransformer, rpe: RPEConfig, impl: str = "auto"
) -> VisionTransformer:
    """Put zero-initialised relative position tables into every block, in place.

    Works on any timm VisionTransformer whose blocks hold timm's `Attention`: DeiT, DINOv2 with
    its registers, CLIP, SigLIP, with or without class token. Logits are unchanged until training
    moves the tables. `model.set_input_size` goes on working: the bucket maps follow the grid.

    Args:
        impl: implementation of the op, as in `irpe_attention`.

    Returns:
        The same model.

    Raises:
        ConfigError: a model that cannot carry the encoding; the message says why.
    """
    _check(model)
    select(impl)
    maps = build_maps(rpe, *model.patch_embed.grid_size, model.num_prefix_tokens)
    for block in model.blocks:
        block.attn = RPEAttention(block.attn, rpe, maps, impl)

    def set_input_size(self: VisionTransformer, *args: object, **kwargs: object) -> None:
        type(self).set_input_size(self, *args, **kwargs)
        _set_maps(self, rpe)

    model.set_input_size = MethodType(set_input_size, model)
    return model


def _check(model: VisionTransformer) -> None:
    expected = "a timm VisionTransformer with timm's Attention in every block"
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ConfigError("equip", expected, name)
    if model.dynamic_img_size:
        raise ConfigError(
            "equip", "a model of one input size (change it with set_input_size)", "dynamic_img_size"
        )
    if isinstance(model.patch_drop, PatchDropout):
        raise ConfigError("equip", "a model that keeps every patch", "patch_drop_rate > 0")
    for number, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if type(attention) is not Attention:
            kind = type(block if attention is None else attention).__name__
            raise ConfigError("equip", expected, f"{kind} in blocks.{number} of {name}")


def _set_maps(model: VisionTransformer, rpe: RPEConfig) -> None:
    """Point every table at the bucket maps of the model's present grid."""
    maps = build_maps(rpe, *model.patch_embed.grid_size, model.num_prefix_tokens)
    by_method = {buckets.method: buckets for buckets in maps}
    for module in model.modules():
        if isinstance(module, RPETable):
            buckets = by_method[module.buckets.method]
            module.buckets = buckets.to(module().device)
