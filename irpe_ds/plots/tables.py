"""The learned relative position tables of a model, a map per layer and head."""

import textwrap
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize as Scale
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor, device

from irpe_ds.checkpoint.reader import SavedWeights
from irpe_ds.config import RunConfig
from irpe_ds.data.pipelines.pipeline import open_pipeline
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model, load_weights
from irpe_ds.models.offset_maps import offset_maps, targets
from irpe_ds.plots.style import FAINT, INK, plain
from irpe_ds.training.batch import Normalize
from irpe_ds.training.evaluation import open_checked

SIDE = 1.5
"""Height of a map, inches."""
SHOWN = {
    "k": "mean logit of relative position on keys",
    "q": "mean logit of relative position on queries",
    "v": "length of relative position on values",
}


def read_maps(
    config: RunConfig,
    weights: Path | SavedWeights,
    on: str | None,
    layers: str | None,
    images: int,
) -> tuple[str, dict[int, np.ndarray]]:
    """What is drawn, k, q or v, and its maps by layer.

    Args:
        weights: of the model: .pth, .safetensors or a checkpoint.
        on: None for the first of k, q, v that has tables.
        layers: numbers such as "0,5,11"; None for all.
        images: of the validation set, where the maps depend on images.

    Raises:
        ConfigError: the model has no such tables or layers, or the weights are another model's.
        DataError: the validation set cannot be read.
    """
    model: Any = build_model(config.model.without_weights()).eval()
    if not targets(model):
        raise ConfigError("model", "one with relative position tables", config.model.name)
    on = on or targets(model)[0]
    if on not in targets(model):
        raise ConfigError("--on", f"one of {', '.join(targets(model))}, which have tables", on)
    numbers = chosen_layers(layers, len(getattr(model, "encoder", model).blocks))
    load_weights(model, weights, where="--weights")
    maps = offset_maps(model, on, lambda: validation_images(config, images))
    return on, {n: maps[n].numpy() for n in numbers}


def chosen_layers(text: str | None, count: int) -> list[int]:
    """The numbers in "0,5,11", each below count; all of them without a text."""
    if text is None:
        return [*range(count)]
    numbers = text.split(",")
    if not set(numbers) <= {str(number) for number in range(count)}:
        raise ConfigError("--layers", f"numbers from 0 to {count - 1}, as in 0,1", repr(text))
    return [int(number) for number in numbers]


def validation_images(config: RunConfig, count: int) -> Tensor:
    """(count, 3, H, W) images spread evenly over the validation set, as the model takes them."""
    open_checked(config, "val")
    data = config.data
    pipeline = open_pipeline(data, "val")
    count = min(count, pipeline.num_samples)
    samples = np.linspace(0, pipeline.num_samples - 1, count).astype(np.int64)
    size, crop = config.model.img_size, data.val_crop
    with closing(pipeline.evaluate(samples, batch_size=count, size=size, crop=crop)) as batches:
        images, _ = next(batches)
    return Normalize(data, device("cpu"))(images)


def draw_tables(maps: Mapping[int, np.ndarray], on: str, name: str) -> Figure:
    """A row per layer, a column per head; every layer has its own colour range.

    Args:
        maps: by layer, (heads, 2 height - 1, 2 width - 1) as `offset_maps` gives them.
    """
    heads, rows, columns = next(iter(maps.values())).shape
    width = SIDE * heads * columns / rows + 1.5
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(width, SIDE * len(maps) + 1.1), dpi=160, layout=layout)
    grid = figure.subplots(len(maps), heads, squeeze=False, sharex=True, sharey=True)
    for axes_of_layer, (layer, maps_of_layer) in zip(grid, maps.items(), strict=True):
        limit = float(np.abs(maps_of_layer).max()) or 1.0
        scale = Scale(0 if on == "v" else -limit, limit)
        colours = ScalarMappable(scale, "Blues" if on == "v" else "RdBu_r")
        for axes, map_ in zip(axes_of_layer, maps_of_layer, strict=True):
            _draw_map(axes, map_, scale, colours)
        axes_of_layer[0].set_ylabel(f"layer {layer}", color=INK, fontsize=10)
        bar = figure.colorbar(colours, ax=[*axes_of_layer], aspect=14, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, colors=INK, labelsize=8)
        bar.locator = MaxNLocator(4, symmetric=True)
    for head, axes in enumerate(grid[0]):
        axes.set_title(f"head {head}" if heads > 1 else "all heads", fontsize=10, color=INK)
    text = textwrap.fill(f"{name}: {SHOWN[on]}", int(10 * width))  # ten characters per inch
    figure.suptitle(plain(text), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel("offset from query to key, patches", fontsize=9, color=INK)
    return figure


def _draw_map(axes: Axes, map_: np.ndarray, scale: Scale, colours: ScalarMappable) -> None:
    """One map; the dot is the query."""
    bottom, right = (n // 2 + 0.5 for n in map_.shape)
    extent = (-right, right, bottom, -bottom)
    axes.imshow(map_, cmap=colours.cmap, norm=scale, extent=extent)
    axes.plot(0, 0, "o", color=INK, markersize=2.5)
    axes.spines[:].set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_locator(MaxNLocator(4, integer=True, symmetric=True))
