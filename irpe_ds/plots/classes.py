"""Images with their labels."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from irpe_ds.plots.style import INK, plain

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


def _short(text: str, length: int = LABEL) -> str:
    return plain(
        textwrap.shorten(text, length, placeholder="...") if " " in text else text[:length]
    )
