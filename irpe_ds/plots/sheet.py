"""Sheets of images: rows of tiles with labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from irpe_ds.plots.classes import short
from irpe_ds.plots.style import FAINT, INK, PALE, plain, titled

SIDE = 1.15
"""Width of a tile, inches."""
GAP = 0.07
"""Between tiles, in their widths."""
LINE = 0.15
"""Height of a line of text, in widths of a tile."""
NAME = 1.25
"""Room for the names of rows, in widths of a tile."""


class Tile(NamedTuple):
    """An image and what stands under it."""

    image: np.ndarray | None
    """(H, W, 3); None where it cannot be read."""
    label: str


class Row(NamedTuple):
    """Tiles beside each other."""

    name: str
    """What stands to the left of them."""
    tiles: Sequence[Tile]


def draw_sheet(title: str, note: str, rows: Sequence[Row], head: Sequence[str] = ()) -> Figure:
    """Rows of tiles, whole images without change of their shape.

    Args:
        head: what stands over each column.
    """
    columns = max(len(row.tiles) for row in rows)
    left = NAME if any(row.name for row in rows) else 0
    lines = max(tile.label.count("\n") + 1 if tile.label else 0 for r in rows for tile in r.tiles)
    step = 1 + GAP + LINE * lines
    top = LINE * bool(head)
    width, height = left + columns * (1 + GAP), top + step * len(rows)
    inches = max(5.0, SIDE * width + 0.3)
    figure = titled(title, note, (inches, SIDE * height + 1.1))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(aspect="equal", anchor="NW")
    for column, text in enumerate(head):
        x = left + column * (1 + GAP) + 0.5
        axes.text(x, 0, plain(text), ha="center", va="top", fontsize=8, color=PALE)
    for number, row in enumerate(rows):
        y = top + number * step
        axes.text(left - GAP, y + 0.5, row.name, ha="right", va="center", fontsize=9, color=INK)
        for column, tile in enumerate(row.tiles):
            _draw_tile(axes, tile, left + column * (1 + GAP), y)
    axes.set(xlim=(0, (inches - 0.3) / SIDE), ylim=(height, 0))  # imshow changes it
    return figure


def _draw_tile(axes: Any, tile: Tile, x: float, y: float) -> None:
    """An image in the middle of the unit square at (x, y), and its label below."""
    label = "\n".join(map(short, tile.label.split("\n")))
    axes.text(x + 0.5, y + 1.02, label, ha="center", va="top", fontsize=7.5, color=INK)
    if tile.image is None:
        axes.add_patch(Rectangle((x, y), 1, 1, color=FAINT))
        axes.text(x + 0.5, y + 0.5, "damaged", ha="center", va="center", fontsize=8, color=PALE)
        return
    height, width = tile.image.shape[:2]
    width, height = width / max(height, width), height / max(height, width)
    x, y = x + (1 - width) / 2, y + (1 - height) / 2
    axes.imshow(tile.image, extent=(x, x + width, y + height, y))
