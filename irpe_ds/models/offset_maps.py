"""The contribution of relative position as a function of the offset, for pictures of the tables.

Shape suffixes: B images, H heads (or 1), L tokens, D head dimension, N buckets, Y and X offsets in
rows and in columns, 2 height - 1 and 2 width - 1 of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.rpe.buckets import BucketMap

MULTIPLIED = {"k": 0, "q": 1}
"""Which of queries and keys a table on keys, or on queries, is multiplied with."""


def targets(model: nn.Module) -> str:
    """The targets k, q and v that have tables, in this order; empty for a model without any."""
    layers = attention_layers(model)
    return "".join(t for t in "kqv" if layers and getattr(layers[0], f"rpe_{t}") is not None)


@torch.no_grad()
def offset_maps(model: nn.Module, target: str, images: Callable[[], Tensor]) -> list[Tensor]:
    """One map (H, Y, X) per layer, over the offset of the key from the query, zero in the centre.

    On k and q: what is added to the attention logits; a contextual term is averaged over these
    images and all patches. On v: the norm of the vector that is added to the values. Class,
    distillation and register tokens have no offset and are left out.

    Args:
        target: k, q or v.
        images: called only if needed; returns the model's input (B, 3, height, width).

    Raises:
        ConfigError: the model has no table on this target.
    """
    if target not in [*targets(model)]:
        expected = f"one of {', '.join(targets(model))}" if targets(model) else "a model with RPE"
        raise ConfigError("target", expected, repr(target))
    layers = attention_layers(model)
    terms = [getattr(layer, f"rpe_{target}").terms() for layer in layers]
    vectors_HD: list[Tensor | None] = [None] * len(layers)
    if target != "v" and terms[0][0][0].dim() == 3:  # (H, D, N); a bias has no D
        vectors_HD = _mean_vectors(model, layers, target, images())
    maps = []
    for terms_of_layer, vector_HD in zip(terms, vectors_HD, strict=True):
        parts = [_per_bucket(t, vector_HD)[:, offset_ids(b)] for t, b in terms_of_layer]
        maps.append(torch.stack(parts).sum(0))
    if target == "v":
        return [map_HYXD.norm(dim=-1) for map_HYXD in maps]
    return [map_HYX.flip(1, 2) for map_HYX in maps] if target == "q" else maps  # b(j, i)


def offset_ids(buckets: BucketMap) -> Tensor:
    """(Y, X) bucket of every offset of the key from the query."""
    height, width = buckets.grid
    rows, cols = (torch.arange(1 - n, n, device=buckets.ids.device) for n in (height, width))
    query = (-rows).clamp(min=0)[:, None] * width + (-cols).clamp(min=0)
    key = rows.clamp(min=0)[:, None] * width + cols.clamp(min=0)
    return buckets.ids[query + buckets.skip, key + buckets.skip].long()


def attention_layers(model: nn.Module) -> list[RPEAttention]:
    """Those with tables, in their order; the last block may have none."""
    return [module for module in model.modules() if isinstance(module, RPEAttention)]


def _per_bucket(table: Tensor, vector_HD: Tensor | None) -> Tensor:
    """(H, N) logits, or (H, N, D) vectors of a table on v."""
    return table if vector_HD is None else (vector_HD.unsqueeze(1) @ table).squeeze(1)


def _mean_vectors(
    model: nn.Module, layers: list[RPEAttention], target: str, images: Tensor
) -> list[Tensor | None]:
    """(H, D) per layer: mean query, or key, over images and patches, scaled as in a logit."""
    means: dict[int, Tensor] = {}

    def project(number: int, *args: Any) -> tuple[Tensor, ...]:
        layer = layers[number]
        projected = type(layer).project(layer, *args)
        num_prefix_tokens = getattr(layer, f"rpe_{target}").terms()[0][1].skip
        patches_BHLD = projected[MULTIPLIED[target]][:, :, num_prefix_tokens:]
        means[number] = patches_BHLD.mean((0, 2)) * layer.scale
        return projected

    for number, layer in enumerate(layers):
        vars(layer)["project"] = partial(project, number)
    try:
        model(images)
    finally:
        for layer in layers:
            del vars(layer)["project"]
    return [means[number] for number in range(len(layers))]
