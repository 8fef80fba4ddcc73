"""Draw the learned relative position tables of a checkpoint, a map per layer and head.

python launch/tables.py --run runs/mine --out tables.png
python launch/tables.py --config x.yaml --weights deit_small_..._shared_k.pth --layers 0,5,11
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize as Scale
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor, device

from irpe_ds.cli import run
from irpe_ds.config import RunConfig, load_config
from irpe_ds.data.pipelines.pipeline import open_pipeline
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model, load_weights
from irpe_ds.models.offset_maps import offset_maps, targets
from irpe_ds.training import checkpoint
from irpe_ds.training.batch import Normalize
from irpe_ds.training.evaluation import open_checked

INK, FAINT = "#24292f", "#d8dee4"
SIDE = 1.5  # of a map, inches
SHOWN = {
    "k": "mean logit of relative position on keys",
    "q": "mean logit of relative position on queries",
    "v": "length of relative position on values",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder; its newest checkpoint is drawn")
    source.add_argument("--config", type=Path, metavar="YAML", help="configuration, with --weights")
    parser.add_argument("--weights", type=Path, help=".pth or .safetensors instead of the run's")
    parser.add_argument("--out", type=Path, default=Path("tables.png"), help="PNG to write")
    parser.add_argument("--on", choices=tuple(SHOWN), help="default: the first with tables")
    parser.add_argument("--layers", metavar="N,N", help="numbers from 0; default: all")
    parser.add_argument("--images", type=int, default=64, help="of data.val, to take the mean over")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.out.suffix != ".png":
        raise ConfigError("--out", "a name that ends in .png", args.out)
    if args.images < 1:
        raise ConfigError("--images", "at least 1", args.images)
    if args.run is None and args.weights is None:
        raise ConfigError("--weights", "a file, when --config names no run", "nothing")
    config = load_config(args.config or args.run / "config.yaml", args.overrides)
    model = build_model(config.model.model_copy(update={"weights": None})).eval()
    if not targets(model):
        raise ConfigError("model", "one with relative position tables", config.model.name)
    on = args.on or targets(model)[0]
    if on not in targets(model):
        raise ConfigError("--on", f"one of {', '.join(targets(model))}, which have tables", on)
    layers = chosen_layers(args.layers, len(model.blocks))
    load_weights(model, args.weights or checkpoint.weights_of(args.run), where="--weights")
    maps = offset_maps(model, on, lambda: validation_images(config, args.images))
    figure = draw({n: maps[n].numpy() for n in layers}, on, config.name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)


def chosen_layers(text: str | None, count: int) -> list[int]:
    """The numbers of "0,5,11", each below count; all of them when there is no text."""
    if text is None:
        return [*range(count)]
    numbers = text.split(",")
    if not set(numbers) <= {str(number) for number in range(count)}:
        raise ConfigError("--layers", f"numbers from 0 to {count - 1}, as in 0,1", repr(text))
    return [int(number) for number in numbers]


def validation_images(config: RunConfig, count: int) -> Tensor:
    """So many images from all over the validation set, as the model takes them."""
    open_checked(config, "val")
    data, size = config.data, config.model.img_size
    pipeline = open_pipeline(data, "val")
    count = min(count, pipeline.num_samples)
    samples = np.linspace(0, pipeline.num_samples - 1, count).astype(np.int64)
    size = (size, size) if isinstance(size, int) else size
    with closing(
        pipeline.evaluate(samples, batch_size=count, size=size, crop=data.val_crop)
    ) as batches:
        images, _ = next(batches)
    return Normalize(data, device("cpu"))(images)


def draw(maps: Mapping[int, np.ndarray], on: str, name: str) -> Figure:
    """A row for each layer, a column for each head; every layer has its own range of colours.

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
            _draw_map(axes, map_, colours)
        axes_of_layer[0].set_ylabel(f"layer {layer}", color=INK, fontsize=10)
        bar = figure.colorbar(colours, ax=[*axes_of_layer], aspect=14, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, colors=INK, labelsize=8)
        bar.locator = MaxNLocator(4, symmetric=True)
    for head, axes in enumerate(grid[0]):
        axes.set_title(f"head {head}" if heads > 1 else "all heads", fontsize=10, color=INK)
    text = textwrap.fill(f"{name}: {SHOWN[on]}", int(10 * width))  # ten characters an inch
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel("offset from query to key, patches", fontsize=9, color=INK)
    return figure


def _draw_map(axes: Axes, map_: np.ndarray, colours: ScalarMappable) -> None:
    """One map; the dot is the query."""
    bottom, right = (n // 2 + 0.5 for n in map_.shape)
    extent = (-right, right, bottom, -bottom)
    axes.imshow(map_, cmap=colours.cmap, norm=colours.norm, extent=extent)
    axes.plot(0, 0, "o", color=INK, markersize=2.5)
    axes.spines[:].set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_locator(MaxNLocator(4, integer=True, symmetric=True))


if __name__ == "__main__":
    run(main)
