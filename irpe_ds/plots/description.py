"""A data set described: one figure of its numbers, and one HTML file of all."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from irpe_ds.data.description import (
    Description,
    facts,
    quantiles,
    ranked,
    title,
    weighing,
    yaml_lines,
)
from irpe_ds.plots.classes import short
from irpe_ds.plots.page import page, picture, table
from irpe_ds.plots.style import FAINT, INK, PALE, frame, plain, titled

BARS = 25
"""Classes up to which each has a bar with its name."""
BLUE = "#0072B2"
CHANNELS = {"red": "#D55E00", "green": "#009E73", "blue": BLUE}
BINS = 40
"""Of a histogram."""
WIDEST = 0.995
"""Quantile of a measure that its axis ends at; few images are many times larger."""


def draw_description(description: Description) -> Figure:
    """Images by class, sizes, aspect ratios, bytes, and the values of channels."""
    d = description
    note = f"{facts(d)[0]}.\n{weighing(d)}."
    figure = titled(title(d), plain(note), (12, 7))
    spaces = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1))
    _classes(figure.add_subplot(spaces[:, 0]), d)
    _sizes(figure.add_subplot(spaces[0, 1]), d)
    _histogram(figure.add_subplot(spaces[0, 2]), d.widths / d.heights, "Aspect ratios")
    _histogram(figure.add_subplot(spaces[1, 1]), d.sizes / 1000, "Kilobytes")
    _values(figure.add_subplot(spaces[1, 2]), d)
    return figure


def _classes(axes: Any, d: Description) -> None:
    """A bar per class, or the number of images by rank; the largest class on top."""
    order = np.argsort(-d.counts, kind="stable")
    counts = d.counts[order]
    places = np.arange(len(order))
    frame(axes, "Images by class", "", size=10)
    axes.grid(visible=False)
    axes.set_xlim(0, 1.18 * counts[0])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if len(order) <= BARS:
        axes.barh(places, counts, 0.72, color=BLUE)
        axes.set_yticks(places, [short(d.classes[n]) for n in order])
        for place, count in enumerate(counts):
            text = f" {count:,}"
            axes.text(count, place, text, va="center", fontsize=8.5, color=PALE)
        axes.set_ylim(max(len(order), 8) - 0.4, -0.6)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return
    axes.fill_betweenx(places, counts, color=BLUE, linewidth=0, step="mid")
    axes.set_ylim(len(order) - 1, 0)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("classes, the largest first", color=INK, fontsize=9)
    ends = ("top", "largest", 0, 0.985), ("bottom", "smallest", -1, 0.015)
    for side, name, place, height in ends:
        text = f"{name}: {short(d.classes[order[place]])}, {counts[place]:,}"
        _note(axes, 0.975, height, text, va=side)


def _note(axes: Any, x: float, y: float, text: str, **where: Any) -> None:
    """Small text in front of what is drawn."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
    where = {"ha": "right", "color": INK, **where}
    axes.text(x, y, text, fontsize=8.5, transform=axes.transAxes, bbox=box, **where)


def _sizes(axes: Any, d: Description) -> None:
    """How many images have which width and height."""
    frame(axes, "Sizes", "height, pixels", size=10)
    axes.grid(visible=False)
    axes.set_xlabel("width, pixels", color=INK)
    end = 1.08 * max(np.quantile(values, WIDEST) for values in (d.widths, d.heights))
    inside = (np.minimum(values, 0.999 * end) for values in (d.widths, d.heights))
    _, _, _, drawn = axes.hist2d(
        *inside, BINS, range=[[0, end], [0, end]], cmin=1, cmap="Blues", norm=LogNorm(0.3)
    )
    bar = axes.figure.colorbar(drawn, ax=axes, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0, colors=INK, labelsize=8)
    bar.set_label("images", color=INK, fontsize=9)
    axes.plot([0, end], [0, end], color=FAINT, linewidth=0.8, zorder=0)


def _histogram(axes: Any, values: np.ndarray, name: str) -> None:
    """How many images have which value."""
    frame(axes, name, "images", size=10)
    low, high = values.min(), np.quantile(values, WIDEST)
    if high - low < 1e-6 * high:
        low, high = 0.5 * low, 1.5 * high
    shown = np.minimum(values, high)
    axes.hist(shown, BINS, range=(low, high), color=BLUE)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if values.max() > 1.2 * high:
        largest = f"{values.max():,.0f}" if values.max() >= 100 else f"{values.max():.3g}"
        _note(axes, 0.99, 0.97, f"largest {largest}", va="top", color=PALE)


def _values(axes: Any, d: Description) -> None:
    """How often each channel has which value."""
    frame(axes, "Values of pixels", "%", size=10)
    axes.set_xlabel("value", color=INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 130 * max(d.values[:, 1:-1].max(), 1e-3))  # black and white may be anything
    for line, (name, colour) in enumerate(CHANNELS.items()):
        axes.plot(np.linspace(0, 1, 256), 100 * d.values[line], color=colour, linewidth=1.2)
        text = f"{name} {d.mean[line]:.3f} \u00b1 {d.std[line]:.3f}"
        _note(axes, 0.98, 0.97 - 0.1 * line, text, va="top", color=colour)


def to_html(description: Description, pictures: Sequence[Path]) -> str:
    """Everything as one HTML file.

    Args:
        pictures: PNGs in the order in which they are shown.
    """
    head, *lines = quantiles(description)
    columns, *classes = ranked(description)
    state = " open" if len(classes) <= BARS else ""
    parts = [
        f"<h1>{html.escape(description.path.name)}</h1>",
        f"<p>{html.escape(title(description))}</p>",
        table(head, lines),
        *(f'<p class="note">{html.escape(text)}</p>' for text in facts(description)),
        f"<p>{html.escape(weighing(description))}; for the YAML of a run:</p>",
        f"<pre>{html.escape(yaml_lines(description))}</pre>",
        *map(picture, pictures),
        f"<details{state}><summary>Images by class</summary>{table(columns, classes)}</details>",
    ]
    return page(description.path.name, parts)
