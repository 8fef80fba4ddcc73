"""Images of a data set as they are stored, and as training shows them to the model."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from irpe_ds.config import RunConfig
from irpe_ds.data.beton.images import DAMAGE
from irpe_ds.data.description import choose, class_names
from irpe_ds.data.loaders import Batch
from irpe_ds.data.order import TrainOrder
from irpe_ds.data.pipelines.pipeline import open_pipeline
from irpe_ds.data.pipelines.timm import Images
from irpe_ds.data.rng import image_keys
from irpe_ds.plots.classes import label_texts, short, unnormalized
from irpe_ds.plots.sheet import Row, Tile, draw_sheet
from irpe_ds.training.batch import Inputs, seed_step
from irpe_ds.training.datasets import with_class_count

COLUMNS = 10
"""Images in a row of the sheet of classes."""
BY_ROW = 12
"""Classes up to which each has rows of its own."""
ROWS = 3
"""Rows of a class at most."""
SHOWN = 100
"""Images on the sheet where each is of another class."""
THUMBNAIL = 256
"""Pixels of the longer side of an image on a sheet."""
VIEWED, EPOCHS = 6, 7
"""Images on the sheet of augmented views, an even number since mixing takes pairs; their views."""


def draw_classes(images: Images, seed: int) -> Figure:
    """Some images of each class, drawn at random; of many classes, one image of some classes."""
    labels, names = images.labels, class_names(images.info, images.labels)
    present = np.unique(labels)
    if len(present) <= BY_ROW:
        title, rows = "Images of each class", [*_rows_of_classes(images, names, seed)]
    else:
        some = present[np.linspace(0, len(present) - 1, min(SHOWN, len(present))).astype(int)]
        few = f" of {len(present):,}" if len(some) < len(present) else ""
        title = f"{len(some)}{few} classes, an image of each"
        tiles = [
            Tile(thumbnail(images, int(_some(labels, label, 1, seed)[0])), names[label])
            for label in some
        ]
        rows = [Row("", tiles[n : n + COLUMNS]) for n in range(0, len(tiles), COLUMNS)]
    return draw_sheet(title, f"{images.info.path.name}. Drawn at random, seed {seed}.", rows)


def _rows_of_classes(images: Images, names: Sequence[str], seed: int) -> Iterator[Row]:
    labels, counts = images.labels, np.bincount(images.labels)
    lines = min(ROWS, max(1, BY_ROW // np.count_nonzero(counts)))
    for label in np.flatnonzero(counts).tolist():
        samples = _some(labels, label, lines * COLUMNS, seed)
        tiles = [Tile(thumbnail(images, int(sample)), "") for sample in samples]
        for first in range(0, len(tiles), COLUMNS):
            name = "" if first else f"{short(names[label])}\n{counts[label]:,}"
            yield Row(name, tiles[first : first + COLUMNS])


def _some(labels: np.ndarray, label: int, count: int, seed: int) -> np.ndarray:
    """At most `count` samples of a class, at random."""
    members = np.flatnonzero(labels == label)
    return members[choose(len(members), count, seed)]


def thumbnail(images: Images, sample: int) -> np.ndarray | None:
    """An image (H, W, 3) uint8, reduced; None if it is damaged."""
    try:
        image = images.open(sample).convert("RGB")
    except DAMAGE:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def draw_views(images: Images, config: RunConfig, recipe: Path) -> Figure:
    """Some images, each with its views in the first epochs, under the labels that training uses."""
    total = images.info.num_samples
    rng = np.random.default_rng(config.seed)
    samples = np.sort(rng.choice(total, VIEWED, replace=total < VIEWED)).astype(np.int64)
    config, names = with_class_count(config, "train"), class_names(images.info, images.labels)
    rows = [[Tile(thumbnail(images, int(n)), names[images.labels[n]])] for n in samples]
    for shown, labels in _views(config, samples, names):
        for row, image, label in zip(rows, shown, labels, strict=True):
            row.append(Tile(image, label))
    head = ["stored", *(f"epoch {number}" for number in range(EPOCHS))]
    note = f"{images.info.path.name}, augmented as in {recipe}, seed {config.seed}."
    if config.augment.mixup or config.augment.cutmix:
        note += " Mixed among these images."
    return draw_sheet("Augmented views", note, [Row("", row) for row in rows], head)


def _views(
    config: RunConfig, samples: np.ndarray, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Pixels (B, H, W, 3) in [0, 1] and labels of each epoch."""
    pipeline = open_pipeline(config.data, "train", config.augment)
    inputs = Inputs(config, torch.device("cpu"))
    order = TrainOrder(samples, np.zeros_like(samples), samples)
    for epoch in range(EPOCHS):
        keys, size = image_keys(samples, seed=config.seed, epoch=epoch), config.model.size_at(epoch)
        with closing(pipeline.train(order, keys, batch_size=len(samples), size=size)) as batches:
            decoded = next(batches)
        seed_step(config.seed, epoch, rank=0)
        shown, targets = inputs(Batch(*decoded, keys))
        yield unnormalized(shown, config.data), label_texts(targets, names)
