"""What gives learned values of position their meaning: grid, prefix tokens and encoding."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from irpe_ds.config_types import Count, Natural
from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import first_layer
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.schema import parse_json

KEY = "positions"
"""Of the metadata of a .safetensors file, and beside "model" in a .pth."""
Grid = tuple[Count, Count]
"""Rows and columns of patches."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What shapes of tensors do not tell; every weights file that a run writes says it."""

    grid: Grid | None
    """None: a model without patches, such as a ResNet."""
    prefix_tokens: Natural
    """Class, distillation and register tokens."""
    encoding: RPEConfig | None
    """None: no relative position."""

    @classmethod
    def of(cls, model: Any) -> "Positions":
        """Those of a model, on any device."""
        trunk, layer = getattr(model, "encoder", model), first_layer(model)
        return cls(
            grid=getattr(getattr(trunk, "patch_embed", None), "grid_size", None),
            prefix_tokens=getattr(model, "num_prefix_tokens", 0),
            encoding=None if layer is None else layer.rpe,
        )

    @classmethod
    def parse(cls, text: str, where: object) -> "Positions":
        """Those that `to_json` wrote; raises ConfigError if it did not."""
        return parse_json(text, cls, f"{where}: {KEY}", ConfigError)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def check_encoding(here: Positions, there: Positions) -> None:
    """Raise ConfigError unless weights from `there` mean the same `here`, on any grid.

    Weights without relative position may go where there is one: its tables start at zero.
    """
    if here.prefix_tokens != there.prefix_tokens:
        raise ConfigError(KEY, f"{here.prefix_tokens} prefix tokens", str(there.prefix_tokens))
    ours, theirs = _values(here.encoding), _values(there.encoding)
    if there.encoding is None or ours == theirs:
        return
    if here.encoding is None:
        raise ConfigError(KEY, "no relative position (model.rpe)", _text(theirs))
    differ = [key for key in ours if ours[key] != theirs[key]]
    expected, got = (_text({key: side[key] for key in differ}) for side in (ours, theirs))
    raise ConfigError(KEY, f"the encoding of model.rpe, {expected}", got)


def check_file(model: nn.Module, path: Path) -> None:
    """Raise ConfigError if a .safetensors file says that its weights are of another encoding."""
    with safe_open(path, "pt") as file:
        stated = (file.metadata() or {}).get(KEY)
    if stated is not None:
        check_encoding(Positions.of(getattr(model, "model", model)), Positions.parse(stated, path))


def _values(encoding: RPEConfig | None) -> dict[str, Any]:
    if encoding is None:
        return {}
    values = {field.name: getattr(encoding, field.name) for field in fields(encoding)}
    return values | {"on": "".join(sorted(encoding.on))}


def _text(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def check_grid(model: nn.Module, there: Positions) -> None:
    """Raise ConfigError if a model learns a value per position, and weights have another grid."""
    here = Positions.of(model).grid
    if there.grid in (None, here) or here is None:
        return
    by_offset = any(getattr(m, "window_size", None) == here for m in model.modules())  # as in BEiT
    if by_offset or isinstance(getattr(model, "pos_embed", None), Tensor):
        raise ConfigError(KEY, f"a grid of {_size(here)} patches", _size(there.grid))


def on_grid(model: Any, embedding: Tensor, stated: Grid | None) -> Tensor:
    """A position embedding (1, L, C) of a file, on the model's grid.

    Args:
        stated: the grid that the file says. None: it says nothing, and is taken for what it was
            released for, or a square, unless it could have the model's shape too.

    Raises:
        ConfigError: the file's grid is unknown, or is not what its number of tokens is.
    """
    grid = model.patch_embed.grid_size
    skip = 0 if model.no_embed_class else model.num_prefix_tokens
    tokens = embedding.shape[1] - skip
    old = _guess(model, tokens) if stated is None else stated
    if old is None:
        raise ConfigError(
            KEY,
            "a file that says its grid, as launch/export.py writes it, "
            f"for a model of {_size(grid)} patches",
            f"one of {tokens} patches that does not say in which rows and columns",
        )
    if math.prod(old) != tokens:
        raise ConfigError(
            KEY, f"a pos_embed of {_size(old)} patches, as the file says", str(tokens)
        )
    return embedding if old == grid else _resample(embedding, old, grid, skip)


def _guess(model: Any, tokens: int) -> Grid | None:
    """The grid of so many patches, if there is no doubt."""
    height, width = model.patch_embed.grid_size
    side = math.isqrt(tokens)
    square = (side, side) if side**2 == tokens else None
    if tokens == height * width:
        return square if height == width else None
    released = model.pretrained_cfg.get("input_size", (3, 224, 224))
    sizes = zip(released[1:], model.patch_embed.patch_size, strict=True)
    rows, columns = (pixels // patch for pixels, patch in sizes)
    if rows * columns == tokens:
        return rows, columns
    rows = math.isqrt(tokens * height // width)
    has_the_models_shape = rows**2 * width == tokens * height and tokens % max(rows, 1) == 0
    return None if has_the_models_shape and height != width else square


def _resample(embedding: Tensor, old: Grid, new: Grid, skip: int) -> Tensor:
    """Interpolated as by timm, prefix tokens kept.

    If the old grid is not square, which timm 1.0 takes every grid for, the plane through each
    channel is resampled exactly, and the rest is interpolated, which flattens a slope at a border.
    """
    if old[0] == old[1]:
        return resample_abs_pos_embed(embedding, [*new], [*old], num_prefix_tokens=skip)
    prefix, patches = embedding[:, :skip], embedding[:, skip:].float()
    slopes = torch.linalg.lstsq(_centres(old), patches[0]).solution
    rest = patches - _centres(old) @ slopes
    rest = resample_abs_pos_embed(rest, [*new], [*old], num_prefix_tokens=0)
    resampled = rest + _centres(new) @ slopes
    return torch.cat([prefix, resampled.to(embedding.dtype)], dim=1)


def _centres(grid: Grid) -> Tensor:
    """(L, 3): row and column of every patch in [0, 1], and 1."""
    rows, columns = ((torch.arange(n, device="cpu") + 0.5) / n for n in grid)
    return torch.cartesian_prod(rows, columns, torch.ones(1))


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
