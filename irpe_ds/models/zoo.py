"""The zoo: one row per released model, registered with timm under the released name; and `irpe`."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    load_pretrained,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from irpe_ds.models.vision_transformer import equip
from irpe_ds.rpe.config import RPEConfig

EQUIPPED = "irpe"
"""timm's name for any of its models with relative position."""
HUBS = ("hf-hub", "local-dir")
"""How names begin that timm takes for an export."""
WEIGHTS = "model.safetensors"
"""Its file of weights, by timm's name."""
RELEASED_CLASSES = 1000
RELEASES = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One released model; the published figures are on ImageNet-1K at 224 x 224."""

    name: str
    width: int
    heads: int
    rpe: RPEConfig
    params_m: float | None = None
    """Published parameters, millions."""
    macs_m: float | None = None
    """Published multiply-accumulates of one image, millions."""
    top1: float | None = None
    top5: float | None = None


product = partial(RPEConfig, method="product", ratio=1.9)
euclidean = partial(RPEConfig, method="euclidean", ratio=20)
quantization = partial(RPEConfig, method="quantization", ratio=33)
cross = partial(RPEConfig, method="cross", ratio=20)


def _row(size: str, encoding: str, rpe: RPEConfig, *published: float) -> Variant:
    width, heads = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}[size]
    figures = dict(zip(("params_m", "macs_m", "top1", "top5"), published, strict=False))
    name = f"deit_{size}_patch16_224_ctx_{encoding}_shared_{rpe.on}"
    return Variant(name=name, width=width, heads=heads, rpe=rpe, **figures)


ZOO = {
    row.name: row
    for row in (
        _row("tiny", "product_50", product(on="k"), 5.76, 1284, 73.7, 92.0),
        _row("small", "product_50", product(on="k"), 22.09, 4659, 80.9, 95.4),
        _row("small", "product_50", product(on="qk"), 22.13, 4706, 81.0, 95.5),
        _row("small", "product_50", product(on="qkv"), 22.17, 4885, 81.2, 95.5),
        _row("base", "product_50", product(on="k"), 86.61, 17684, 82.3, 95.9),
        _row("base", "product_50", product(on="qkv"), 86.68, 18137, 82.8, 96.1),
        _row("small", "euc_20", euclidean(on="k")),
        _row("small", "quant_51", quantization(on="k")),
        _row("small", "cross_56", cross(on="k")),
    )
}


def _released(row: Variant) -> dict[str, object]:
    """timm's pretrained_cfg of a row; the six published models have a URL of their weights."""
    return {
        "url": f"{RELEASES}/{row.name}.pth" if row.top1 else "",
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "num_classes": RELEASED_CLASSES,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _entrypoint(row: Variant) -> Callable[..., VisionTransformer]:
    """The function that timm.create_model calls; takes VisionTransformer's arguments and `impl`."""

    def build(impl: str = "auto", **kwargs: Any) -> VisionTransformer:
        return equip(VisionTransformer(**kwargs), row.rpe, impl)

    def create(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        size: dict[str, Any] = {
            "patch_size": 16,
            "embed_dim": row.width,
            "depth": 12,
            "num_heads": row.heads,
        }
        with torch.serialization.safe_globals([Namespace]):  # the released files hold one
            model = build_model_with_cfg(
                build,
                row.name,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg={"out_indices": 3, "feature_cls": "getter"},
                **(size | kwargs),
            )
        if pretrained:
            _check_encoding(model, kwargs.get("cache_dir"))
        return model

    create.__name__ = row.name
    create.__doc__ = f"DeiT with {row.rpe}."
    return create


default_cfgs = generate_default_cfgs({name: _released(row) for name, row in ZOO.items()})
for _row_of_zoo in ZOO.values():
    register_model(_entrypoint(_row_of_zoo))


def _check_encoding(model: Any, cache_dir: Path | str | None) -> None:
    """Raise ConfigError if the file that timm has just read says another encoding.

    timm compares shapes, which many encodings share.
    """
    source: dict[str, Any] = model.pretrained_cfg
    path: Any = Path(source.get("file") or "", WEIGHTS)
    if source.get("source") == "hf-hub":
        from huggingface_hub import try_to_load_from_cache

        name, _, revision = source["hf_hub_id"].partition("@")
        path = try_to_load_from_cache(name, WEIGHTS, cache_dir, revision or None)
    if source.get("source") in HUBS and isinstance(path, str | Path) and Path(path).is_file():
        from irpe_ds.models import positions  # it needs pydantic

        positions.check_file(model, Path(path))


def _equipped(
    pretrained: bool = False,
    *,
    base: str,
    rpe: dict[str, Any],
    impl: str = "auto",
    **kwargs: Any,
) -> VisionTransformer:
    """The model that timm calls `base`, with relative position.

    Args:
        pretrained: with timm's weights of `base`; from a `local-dir:` or `hf-hub:`, with those.
        rpe: the fields of an RPEConfig.
    """
    source = kwargs.get("pretrained_cfg") or {}
    own = isinstance(source, dict) and source.get("source") in HUBS
    plain = timm.create_model(base, pretrained=pretrained and not own, **kwargs)
    model: Any = equip(plain, RPEConfig(**rpe), impl)
    model.pretrained_cfg["architecture"] = EQUIPPED  # with it timm's own exports name this
    if pretrained and own:
        # It resamples positions for another size; the names are the model's own already.
        resample = checkpoint_filter_fn if hasattr(model, "patch_embed") else None
        load_pretrained(
            model,
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3),
            filter_fn=resample,
            cache_dir=kwargs.get("cache_dir"),
        )
        _check_encoding(model, kwargs.get("cache_dir"))
    return cast(VisionTransformer, model)


_equipped.__name__ = EQUIPPED
register_model(_equipped)
