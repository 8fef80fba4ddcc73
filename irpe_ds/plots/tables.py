"""The learned relative position tables of a model, a map per layer and head."""

import math
import textwrap
from collections.abc import Mapping, Sequence
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
from irpe_ds.models.offset_maps import attention_layers, offset_maps, targets
from irpe_ds.models.vision_transformer import last_block_is_inert
from irpe_ds.plots.style import FAINT, INK, plain
from irpe_ds.training.batch import Normalize
from irpe_ds.training.datasets import open_checked, with_class_count

SIDE = 1.5
"""Height of a map, inches."""
INERT = "\ninert: only the class\ntoken is read here"
BESIDE = 4
"""Layers in a row, if each has one map."""
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
) -> tuple[str, dict[int, np.ndarray], int | None]:
    """What is drawn, k, q or v, its maps by layer, and which layer is inert, if one is.

    Args:
        weights: of the model: .pth, .safetensors or a checkpoint.
        on: None for the first of k, q, v that has tables.
        layers: numbers such as "0,5,11"; None for all.
        images: of the validation set, where the maps depend on images.

    Raises:
        ConfigError: the model has no such tables or layers, or the weights are another model's.
        DataError: the validation set cannot be read.
    """
    config = with_class_count(config, "val")
    model: Any = build_model(config.model.without_weights()).eval()
    if not targets(model):
        raise ConfigError("model", "one with relative position tables", config.model.name)
    on = on or targets(model)[0]
    if on not in targets(model):
        raise ConfigError("--on", f"one of {', '.join(targets(model))}, which have tables", on)
    count = len(attention_layers(model))
    numbers = chosen_layers(layers, count)
    load_weights(model, weights, where="--weights")
    maps = offset_maps(model, on, lambda: validation_images(config, images))
    inert = count - 1 if last_block_is_inert(model) else None
    return on, {n: maps[n].numpy() for n in numbers}, inert


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


def draw_tables(
    maps: Mapping[int, np.ndarray], on: str, name: str, inert: int | None = None
) -> Figure:
    """A row per layer, a column per head; every layer has its own colour range.

    Layers whose heads share a map stand beside each other.

    Args:
        maps: by layer, (heads, 2 height - 1, 2 width - 1) as `offset_maps` gives them.
        inert: the layer whose tables are said to be without effect.
    """
    heads, rows, columns = next(iter(maps.values())).shape
    beside = 1 if heads > 1 else min(BESIDE, len(maps))
    lines = math.ceil(len(maps) / beside)
    width = (SIDE * heads * columns / rows + (1.5 if beside == 1 else 0.9)) * beside
    text = f"{name}: {SHOWN[on]}" + (", all heads" if heads == 1 else "")
    text = textwrap.fill(text, int(9 * width))  # nine characters per inch
    height = SIDE * lines + 0.9 + 0.2 * (text.count("\n") + 1)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, compress=True)
    figure = Figure(figsize=(width, height), dpi=160, layout=layout)
    grid = figure.subplots(lines, heads * beside, squeeze=False, sharex=True, sharey=True)
    places = [[*axes] for axes in (grid if heads > 1 else grid.reshape(-1, 1))]
    for empty in range(len(maps), len(places)):
        places[empty][0].set_axis_off()
        places[empty - beside][0].tick_params(labelbottom=True)
    for axes_of_layer, (layer, maps_of_layer) in zip(places, maps.items(), strict=False):
        _draw_layer(figure, axes_of_layer, maps_of_layer, on)
        label = f"layer {layer}{INERT if layer == inert else ''}"
        if heads == 1:
            axes_of_layer[0].set_title(label, fontsize=10, color=INK)
        else:
            axes_of_layer[0].set_ylabel(label, color=INK, fontsize=10)
    if heads > 1:
        for head, axes in enumerate(grid[0]):
            axes.set_title(f"head {head}", fontsize=10, color=INK)
    figure.suptitle(plain(text), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel("offset from query to key, patches", fontsize=9, color=INK)
    return figure


def _draw_layer(figure: Figure, places: Sequence[Axes], maps: np.ndarray, on: str) -> None:
    """The maps of a layer's heads, with their colour bar."""
    limit = float(np.abs(maps).max()) or 1.0
    scale = Scale(0 if on == "v" else -limit, limit)
    colours = ScalarMappable(scale, "Blues" if on == "v" else "RdBu_r")
    for axes, map_ in zip(places, maps, strict=True):
        _draw_map(axes, map_, scale, colours)
    bar = figure.colorbar(colours, ax=[*places], aspect=14, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK, labelsize=8)
    bar.locator = MaxNLocator(4, symmetric=True)


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
