"""Images with their labels, and how well each class is recognised."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from irpe_ds.plots.style import FAINT, INK, PALE, plain

WRITTEN, NAMED = 20, 60
"""Classes of a confusion matrix whose numbers, and whose names, are written."""
LABEL = 18
"""Characters of a class's name that are drawn."""


def draw_images(images: np.ndarray, labels: Sequence[str]) -> Figure:
    """A grid of images, each under its label.

    Args:
        images: (B, H, W, 3) in [0, 1].
    """
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    side, under = 1.5, 0.1 + 0.16 * max(label.count("\n") + 1 for label in labels)
    height = side * images.shape[1] / images.shape[2] + under
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
    figure = Figure(figsize=(side * columns, height * lines), dpi=120, layout=layout)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, label in zip(grid.flat, images, labels, strict=False):
        axes.imshow(image)
        axes.set_title("\n".join(map(_short, label.split("\n"))), fontsize=9, color=INK, pad=3)
    return figure


def draw_confusion(counts: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Images by class, a row each, and by predicted class.

    Args:
        counts: (C, C) integers.
    """
    size = min(12.0, max(3.4, 1.4 + 0.42 * len(names)))
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(size + 0.6, size), dpi=140, layout=layout)
    axes = figure.subplots()
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("class", color=INK)
    axes.spines[:].set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    if len(names) <= NAMED:
        shown = [_short(name) for name in names]
        flat = max(map(len, shown)) <= 2
        axes.set_xticks(range(len(names)), shown, rotation=0 if flat else 90)
        axes.set_yticks(range(len(names)), shown)
    if len(names) <= WRITTEN:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 60 else INK
            if count:
                axes.text(column, row, count, ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK, labelsize=8)
    bar.set_label("% of the class", color=PALE, fontsize=8)
    right = 100 * counts.trace() / max(1, counts.sum())
    figure.suptitle(
        f"{_short(title, 60)}: {right:.2f} % of {counts.sum():,} images",
        x=0.02,
        ha="left",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    return figure


def class_rows(counts: np.ndarray, names: Sequence[str]) -> list[dict[str, object]]:
    """Each class's images, shares in per cent, and which class it is taken for most often.

    `recall`: of its images those found; `precision`: of images said to be of it those that are;
    None of no images.
    """
    rows: list[dict[str, object]] = []
    for number, name in enumerate(names):
        right, images = int(counts[number, number]), int(counts[number].sum())
        said, wrong = int(counts[:, number].sum()), counts[number].copy()
        wrong[number] = 0
        row = {
            "class": name,
            "images": images,
            "recall": 100 * right / images if images else None,
            "precision": 100 * right / said if said else None,
            "mostly taken for": names[int(wrong.argmax())] if wrong.any() else None,
        }
        rows.append(row)
    return rows


def _short(text: str, length: int = LABEL) -> str:
    return plain(
        textwrap.shorten(text, length, placeholder="...") if " " in text else text[:length]
    )
