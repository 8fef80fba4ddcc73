"""Loss, accuracy and learning rate of runs, over epochs or updates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from irpe_ds.errors import ConfigError
from irpe_ds.plots.style import INK, frame, plain
from irpe_ds.runlog import METRICS, read_rows

Rows = Sequence[Mapping[str, Any]]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
DASHES: tuple[Literal["-", "--"], ...] = ("-", "--")
FEW = 12
"""Curves with at most this many points have markers."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What one pair of axes shows: keys of rows of a kind, the first solid, the second dashed."""

    title: str
    unit: str
    kind: str
    keys: tuple[str, ...]
    last: str
    """Format of the value written at the end of a curve."""
    width: float = 1.0


PANELS = (
    Panel(
        title="Training loss", unit="cross-entropy, nats", kind="train", keys=("loss",), last=".3f"
    ),
    Panel(
        title="Validation accuracy",
        unit="% of images",
        kind="eval",
        keys=("top1", "top5"),
        last=".1f",
    ),
    Panel(
        title="Learning rate", unit="per update", kind="train", keys=("lr",), last=".2g", width=0.75
    ),
)
LEGEND = {"top1": "top-1", "top5": "top-5"}


@dataclass(frozen=True)
class Curve:
    """One key of one run; non-finite values leave gaps."""

    x: list[float]
    y: list[float]

    @classmethod
    def of(cls, rows: Rows, kind: str, key: str, axis: str) -> "Curve":
        own = [r for r in rows if r["kind"] == kind and key in r]
        points = [r for r in own if math.isfinite(r.get(axis, math.nan))]
        return cls([r[axis] for r in points], [r[key] for r in points])

    def finite(self) -> list[float]:
        return [y if math.isfinite(y) else math.nan for y in self.y]

    def end(self) -> tuple[float, float] | None:
        """The last finite point."""
        points = [p for p in zip(self.x, self.y, strict=True) if math.isfinite(p[1])]
        return points[-1] if points else None


def read_runs(folders: Sequence[Path], axis: str) -> dict[str, Rows]:
    """The rows of each run by name, or by path where two runs share a name.

    Raises:
        ConfigError: a folder has no metrics, or none that a panel could show.
    """
    names = [folder.resolve().name for folder in folders]
    runs: dict[str, Rows] = {}
    for folder, name in zip(folders, names, strict=True):
        rows = read_rows(folder / METRICS)
        shown = (Curve.of(rows, panel.kind, key, axis).x for panel in PANELS for key in panel.keys)
        if not any(shown):
            expected = f"rows of training or evaluation by {axis}"
            raise ConfigError(folder / METRICS, expected, f"none among {len(rows)}")
        runs[name if names.count(name) == 1 else str(folder)] = rows
    return runs


def draw_curves(runs: dict[str, Rows], axis: str) -> Figure:
    """A figure with those of PANELS that the runs have rows for."""
    curves = {
        panel: {
            (name, key): curve
            for name, rows in runs.items()
            for key in panel.keys
            if (curve := Curve.of(rows, panel.kind, key, axis)).x
            and not (key == "top5" and min(curve.y) == 100)  # of five classes or fewer
        }
        for panel in PANELS
    }
    panels = [panel for panel in PANELS if curves[panel]]
    widths = [panel.width for panel in panels]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(4.4 * sum(widths), 3.9), dpi=160, layout=layout)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, width_ratios=widths)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}
    for panel, axes in zip(panels, grid[0], strict=True):
        _draw_panel(axes, panel, curves[panel], colours)
        axes.set_xlabel(axis, color=INK)
    figure.legend(
        [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()],
        [plain(name) for name in colours],
        loc="outside upper center",
        ncols=min(len(colours), 4),
        frameon=False,
        fontsize=11,
        labelcolor=INK,
    )
    return figure


def _draw_panel(
    axes: Axes,
    panel: Panel,
    curves: dict[tuple[str, str], Curve],
    colours: dict[str, str],
) -> None:
    frame(axes, panel.title, panel.unit)
    axes.margins(x=0.02)
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        direction.set_major_formatter(StrMethodFormatter("{x:g}"))
    for (name, key), curve in curves.items():
        axes.plot(
            curve.x,
            curve.finite(),
            color=colours[name],
            linestyle=DASHES[panel.keys.index(key)],
            linewidth=1.5,
            marker="o" if len(curve.x) <= FEW else None,
            markersize=3,
        )
    _write_last_values(axes, panel, curves, colours)
    keys = [key for key in panel.keys if any(key == drawn for _, drawn in curves)]
    if len(panel.keys) > 1:
        axes.legend(
            [Line2D([], [], color=INK, linestyle=DASHES[panel.keys.index(k)]) for k in keys],
            [LEGEND[key] for key in keys],
            loc="best",
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )


def _write_last_values(
    axes: Axes,
    panel: Panel,
    curves: dict[tuple[str, str], Curve],
    colours: dict[str, str],
) -> None:
    """Mark the end of each curve and write its value on the right, without overlaps."""
    ends = [(end, name, curve.y[-1]) for (name, _), curve in curves.items() if (end := curve.end())]
    low, high = axes.get_ylim()
    heights = _spread([(y - low) / (high - low) for (_, y), _, _ in ends], gap=0.07)
    for ((x, y), name, value), height in zip(ends, heights, strict=True):
        axes.plot(x, y, "o", color=colours[name], markersize=4.5, clip_on=False, zorder=3)
        axes.annotate(
            format(value, panel.last),
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            fontsize=9.5,
            fontweight="bold",
            color=colours[name],
            annotation_clip=False,
        )
    axes.set_ylim(low, high)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, as little as possible, until neighbours are `gap` from each other."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    # With the gaps subtracted, heights need only be in order: isotonic regression by pooling.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([heights[index] - rank * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    apart = [fmean(pool) for pool in pools for _ in pool]
    return [apart[rank] + rank * gap for rank in map(order.index, range(len(heights)))]
