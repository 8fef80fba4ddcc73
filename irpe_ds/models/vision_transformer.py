"""timm's plain vision transformers with relative position in every block."""

from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import (
    Attention,
    AttentionRope,
    PatchDropout,
    PatchDropoutWithIndices,
    PatchEmbed,
)
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.models.beit import RPEBeitAttention
from irpe_ds.ops.dispatch import check_name
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import RPETable, build_maps

ADAPTERS: dict[type[nn.Module], type[RPEAttention]] = {
    Attention: RPEAttention,
    AttentionRope: RPEAttention,
    EvaAttention: RPEAttention,
    BeitAttention: RPEBeitAttention,
}
"""What replaces an attention of timm."""
KEPT_GRIDS = 16
"""Grids of which a model with dynamic_img_size keeps the bucket maps."""
Grid = tuple[int, int]
Model = TypeVar("Model", bound=nn.Module)


def equip(model: Model, rpe: RPEConfig, impl: str = "auto") -> Model:
    """Add zero-initialised relative position tables to the blocks, in place.

    Works on the models of timm that are blocks of self-attention on one grid of patches: DeiT,
    DINOv2, CLIP, SigLIP, EVA-02, DINOv3, BEiT and others, with or without class token, registers
    and rotary embeddings. Logits are unchanged until training updates the tables. The bucket maps
    follow the grid: after `model.set_input_size`, and in every forward pass of a model with
    dynamic_img_size.

    Args:
        impl: implementation of the op, as in `irpe_attention`.

    Returns:
        The same model.

    Raises:
        ConfigError: the model is not supported; the message says why.
    """
    vit = _checked(model)
    check_name(impl)
    maps = _Maps(vit, rpe)
    shared = maps.current()
    blocks = vit.blocks if rpe.last_block else vit.blocks[:-1]
    if not blocks:
        raise ConfigError("equip", "two blocks or more without last_block", len(vit.blocks))
    for block in blocks:
        block.attn = ADAPTERS[type(block.attn)](block.attn, rpe, shared, impl)
    if hasattr(vit, "set_input_size"):
        vit.set_input_size = partial(_set_input_size, vit, maps)
    if not getattr(vit.patch_embed, "flatten", True):  # (B, H, W, C), because of dynamic_img_size
        vit.patch_embed.register_forward_hook(maps.follow)
    return model


def last_block_is_inert(model: Any) -> bool:
    """Whether tables in the last block are (nearly) without effect: the classifier reads class
    tokens alone.

    It needs row i of class tokens only, in which every key j has the one bucket b of the prefix
    tokens. What a table T adds there:

    - on k, q_i . T[b], or in bias mode on q and k, T[b]: the same to every logit of the row, which
      softmax ignores. No effect, and a gradient of zero.
    - on q, k_j . T[b]; on v, sum_j a_ij T[b] = T[b]: gradients of one bucket.
    """
    blocks = getattr(model, "blocks", None)
    if not blocks or not isinstance(getattr(blocks[-1], "attn", None), RPEAttention):
        return False
    pools = getattr(model, "global_pool", None), getattr(model, "attn_pool", None)
    return pools == ("token", None)


class _Maps:
    """The bucket maps of one model, for the grids that it was last given."""

    def __init__(self, model: Any, rpe: RPEConfig) -> None:
        self.model, self.rpe = model, rpe
        self.grid: Grid = model.patch_embed.grid_size
        self.kept: dict[Grid, tuple[BucketMap, ...]] = {}

    def current(self) -> tuple[BucketMap, ...]:
        """Those of the model's grid, on its device."""
        device = next(self.model.parameters()).device
        maps = self.kept.pop(self.grid, None)
        if maps is None or maps[0].ids.device != device:
            maps = build_maps(self.rpe, *self.grid, self.model.num_prefix_tokens)
            maps = tuple(buckets.to(device) for buckets in maps)
        if len(self.kept) == KEPT_GRIDS:
            del self.kept[next(iter(self.kept))]  # the one that was not used for longest
        self.kept[self.grid] = maps
        return maps

    def use(self, grid: Grid) -> None:
        """Give every table the map of this grid."""
        if grid != self.grid:
            self._change(grid)

    @torch.compiler.disable  # it cannot trace what makes a map
    def _change(self, grid: Grid) -> None:
        self.grid = grid
        by_method = {buckets.method: buckets for buckets in self.current()}
        for module in self.model.modules():
            if isinstance(module, RPETable):
                module.buckets = by_method[module.buckets.method]

    def follow(self, module: nn.Module, args: object, patches_BHWC: Tensor) -> None:
        """A forward hook of the patch embedding."""
        if not isinstance(patches_BHWC, torch.fx.Proxy):  # a traced model keeps its grid
            _, height, width, _ = patches_BHWC.shape
            self.use((int(height), int(width)))


def _set_input_size(model: Any, maps: _Maps, *args: Any, **kwargs: Any) -> None:
    """timm's set_input_size, then the bucket maps of the new grid for every table."""
    type(model).set_input_size(model, *args, **kwargs)
    maps.use(model.patch_embed.grid_size)


def check_resolution(model: nn.Module, img_size: Grid) -> None:
    """Raise ConfigError if a model with dynamic_img_size does not take images of this size."""
    patch_embed: Any = getattr(_trunk(model), "patch_embed", None)
    if getattr(patch_embed, "flatten", True) or patch_embed.dynamic_img_pad:
        return
    patch = patch_embed.patch_size
    if img_size[0] % patch[0] or img_size[1] % patch[1]:
        raise ConfigError("img_size", f"multiples of the patch size {patch}", img_size)


def fit_encoder(model: nn.Module, img_size: Grid) -> None:
    """Make the usual grid of an encoder in a classifier, which takes any, that of this size."""
    patch_embed = getattr(getattr(model, "encoder", None), "patch_embed", None)
    if isinstance(patch_embed, PatchEmbed):
        patch_embed.set_input_size(img_size)


def _trunk(model: nn.Module) -> Any:
    """The part with patch embedding and blocks, which may be all of the model."""
    return getattr(model, "encoder", model)


def _checked(model: nn.Module) -> Any:
    """The trunk of a model that `equip` supports."""
    vit, name = _trunk(model), type(model).__name__
    known = "timm's Attention, AttentionRope or EvaAttention, or BEiT's, in every block"
    expected = f"a timm ViT on one grid of patches with {known}"
    missing = {"patch_embed", "num_prefix_tokens", "blocks"} - {*dir(vit)}
    if missing or not hasattr(vit.patch_embed, "grid_size"):
        raise ConfigError("equip", expected, name)
    if getattr(vit, "rel_pos_bias", None) is not None:
        expected = "use_rel_pos_bias, a table in each block"
        raise ConfigError("equip", expected, "use_shared_rel_pos_bias")
    if isinstance(getattr(vit, "patch_drop", None), PatchDropout | PatchDropoutWithIndices):
        expected = "patch_drop_rate=0 (smaller images save as much time, and keep the grid whole)"
        raise ConfigError("equip", expected, f"patch_drop_rate={vit.patch_drop.prob}")
    for number, block in enumerate(vit.blocks):
        attention = getattr(block, "attn", block)
        if isinstance(attention, RPEAttention):
            raise ConfigError("equip", "a model without relative position", f"{name} with it")
        if type(attention) not in ADAPTERS:
            got = f"{type(attention).__name__} in blocks.{number} of {name}"
            raise ConfigError("equip", expected, got)
    return vit
