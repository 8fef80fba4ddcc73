"""Images with their labels."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from irpe_ds.config import DataConfig
from irpe_ds.plots.style import INK, plain

LABEL = 18
"""Characters of a class's name that are drawn."""
MIXED = 12
"""Characters of it beside its share of a mixed label."""
SURE = 0.85
"""Share of a mixed label from which it is written as one class."""


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
        axes.set_title("\n".join(map(short, label.split("\n"))), fontsize=9, color=INK, pad=3)
    return figure


def unnormalized(images: Tensor, data: DataConfig) -> np.ndarray:
    """Pixels (B, H, W, 3) in [0, 1] of a model's input (B, 3, H, W)."""
    mean, std = (np.array(values) for values in (data.mean, data.std))
    return (images.float().cpu().permute(0, 2, 3, 1).numpy() * std + mean).clip(0, 1)


def label_texts(targets: Tensor, names: Sequence[str]) -> list[str]:
    """Labels (B,), or mixed ones (B, C), in words: a class, or the two that were mixed."""
    if targets.dim() == 1:
        return [names[label] for label in targets.tolist()]
    shares, labels = targets.float().topk(min(2, targets.shape[1]))
    texts = []
    for parts, found in zip(shares.tolist(), labels.tolist(), strict=True):
        mixed = [f"{names[n][:MIXED]} {part:.2f}" for n, part in zip(found, parts, strict=True)]
        texts.append(names[found[0]] if parts[0] >= SURE else "\n".join(mixed))
    return texts


def short(text: str, length: int = LABEL) -> str:
    """A class's name as it is drawn."""
    return plain(
        textwrap.shorten(text, length, placeholder="...") if " " in text else text[:length]
    )
