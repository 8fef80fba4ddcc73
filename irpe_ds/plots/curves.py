"""Loss, accuracy and learning rate of runs, over epochs or updates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from irpe_ds.errors import ConfigError
from irpe_ds.plots.seeds import Rows, Run
from irpe_ds.plots.style import INK, PALE, frame, plain
from irpe_ds.runlog import METRICS, read_rows

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
DASHES: dict[str, Literal["-", "--", ":"]] = {"top5": "--", "ema_top1": ":", "ema_loss": ":"}
"""Of all keys but the first of a panel."""
LEGEND = {
    "loss": "weights",
    "ema_loss": "their average (EMA)",
    "top1": "top-1",
    "top5": "top-5",
    "ema_top1": "top-1 of the average (EMA)",
}
FEW = 12
"""Curves with at most this many points have markers."""
LONG = 48
"""Characters of a name, with its best score, that fit into half of a figure."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What one pair of axes shows: keys of rows of a kind."""

    title: str
    unit: str
    kind: str
    keys: tuple[str, ...]
    last: str
    """Format of the value written at the end of a curve."""
    best: Literal["max", "min"] | None = None
    """Which value of the first key is marked with a star."""


ACCURACY = Panel(
    title="Validation accuracy",
    unit="% of images",
    kind="eval",
    keys=("top1", "ema_top1", "top5"),
    last=".1f",
    best="max",
)
PANELS = (
    Panel(title="Training loss", unit="nats", kind="train", keys=("loss",), last=".3f"),
    Panel(
        title="Validation loss",
        unit="cross-entropy, nats",
        kind="eval",
        keys=("loss", "ema_loss"),
        last=".3f",
        best="min",
    ),
    ACCURACY,
    Panel(title="Learning rate", unit="per update", kind="train", keys=("lr",), last=".2g"),
)


@dataclass(frozen=True)
class Curve:
    """One key of one run, or its mean over runs; non-finite values leave gaps."""

    x: list[float]
    y: list[float]
    deviation: list[float] | None = None
    """Standard deviation over runs."""

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

    def best(self, which: Literal["max", "min"]) -> int | None:
        """Index of the first best value."""
        known = [i for i, y in enumerate(self.y) if math.isfinite(y)]
        sign = 1 if which == "min" else -1
        return min(known, key=lambda i: sign * self.y[i], default=None)


def mean(curves: Sequence[Curve]) -> Curve:
    """Mean and deviation where all curves have values, on lines between their points."""
    if len(curves) == 1:
        return curves[0]
    if not all(curve.x for curve in curves):
        return Curve([], [])
    first, last = max(min(c.x) for c in curves), min(max(c.x) for c in curves)
    x = sorted({x for curve in curves for x in curve.x if first <= x <= last})
    y = np.array([np.interp(x, curve.x, curve.finite()) for curve in curves])
    return Curve(x, y.mean(0).tolist(), y.std(0, ddof=1).tolist())


def read_runs(folders: Iterable[Path], axis: str) -> dict[str, Run]:
    """The runs by name, or by path where two of them share a name.

    Raises:
        ConfigError: a folder has no metrics, or none that a panel could show.
    """
    folders = list(dict.fromkeys(folders))
    names = [folder.resolve().name for folder in folders]
    runs: dict[str, Run] = {}
    for folder, name in zip(folders, names, strict=True):
        rows = read_rows(folder / METRICS)
        shown = (Curve.of(rows, panel.kind, key, axis).x for panel in PANELS for key in panel.keys)
        if not any(shown):
            expected = f"rows of training or evaluation by {axis}"
            raise ConfigError(folder / METRICS, expected, f"none among {len(rows)}")
        runs[name if names.count(name) == 1 else str(folder)] = Run(folder, rows)
    return runs


def draw_curves(groups: Mapping[str, Sequence[Rows]], axis: str) -> Figure:
    """A figure with those of PANELS that the runs have rows for, a colour per group of runs.

    Raises:
        ConfigError: runs of one group have no epochs, or updates, in common.
    """
    curves = {
        panel: {
            (name, key): curve
            for name, runs in groups.items()
            for key in panel.keys
            if (curve := mean([Curve.of(rows, panel.kind, key, axis) for rows in runs])).x
        }
        for panel in PANELS
    }
    panels = [panel for panel in PANELS if curves[panel]]
    if not panels:
        raise ConfigError(f"the runs that differ only in their seed have no {axis} in common")
    columns = 2 if len(panels) == 4 else len(panels)
    lines = len(panels) // columns
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(4.7 * columns, 1 + 2.9 * lines), dpi=160, layout=layout)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    for panel, axes in zip(panels, grid.flat, strict=True):
        _draw_panel(axes, panel, curves[panel], colours)
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel(axis, color=INK)
    _name(figure, curves[ACCURACY], colours, axis)
    return figure


def _name(
    figure: Figure, accuracy: Mapping[tuple[str, str], Curve], colours: Mapping[str, str], axis: str
) -> None:
    """Names of the groups with their best scores above, what marks and bands are below."""
    names = [plain(name) + _best(accuracy.get((name, "top1")), axis) for name in colours]
    figure.legend(
        [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()],
        names,
        loc="outside upper center",
        ncols=1 if len(names) == 1 or max(map(len, names)) > LONG else 2,
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
    )
    notes = ["Star: the best evaluation."] if accuracy else []
    if any(curve.deviation for curve in accuracy.values()):
        notes.append("Lines and bands: mean and standard deviation over seeds.")
    figure.supxlabel(" ".join(notes), fontsize=8.5, color=PALE)


def _best(curve: Curve | None, axis: str) -> str:
    found = None if curve is None else curve.best("max")
    if curve is None or found is None:
        return ""
    spread = f" ± {curve.deviation[found]:.1f}" if curve.deviation else ""
    return f": best top-1 {curve.y[found]:.1f}{spread} % at {axis} {curve.x[found]:g}"


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
            linestyle=DASHES.get(key, "-"),
            linewidth=1.5,
            marker="o" if len(curve.x) <= FEW else None,
            markersize=3,
        )
        if curve.deviation:
            band = np.array(curve.deviation)
            low, high = curve.finite() - band, curve.finite() + band
            axes.fill_between(curve.x, low, high, color=colours[name], alpha=0.18, linewidth=0)
    _write_last_values(axes, panel, curves, colours)
    _mark_best(axes, panel, curves, colours)
    keys = [key for key in panel.keys if any(key == drawn for _, drawn in curves)]
    if len(keys) > 1:
        axes.legend(
            [Line2D([], [], color=INK, linestyle=DASHES.get(key, "-")) for key in keys],
            [LEGEND[key] for key in keys],
            loc="best",
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )


def _mark_best(
    axes: Axes,
    panel: Panel,
    curves: dict[tuple[str, str], Curve],
    colours: dict[str, str],
) -> None:
    for (name, key), curve in curves.items():
        found = curve.best(panel.best) if panel.best and key == panel.keys[0] else None
        if found is not None:
            place = curve.x[found], curve.y[found]
            axes.plot(
                *place,
                "*",
                color=colours[name],
                markersize=11,
                markeredgecolor="white",
                markeredgewidth=0.6,
                clip_on=False,
                zorder=4,
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
    heights = _spread([(y - low) / (high - low) for (_, y), _, _ in ends], gap=0.08)
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
