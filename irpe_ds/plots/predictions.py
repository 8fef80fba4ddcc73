"""Predictions for images of known classes: the confusion matrix, and the worst mistakes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import ImageOps

from irpe_ds.plots.style import FAINT, INK, PALE, plain, titled
from irpe_ds.prediction import Prediction, Scores, read_image

LARGEST = 25
"""Classes of a confusion matrix; of more, those with the most mistakes are drawn."""
MISTAKES, COLUMNS = 24, 6
"""Images on the sheet of mistakes, and in a row of it."""
THUMBNAIL = 320
"""Pixels of either side of an image on the sheet."""
_NAME = 24  # characters of a class's name


def draw_confusion(scores: Scores, classes: Sequence[str], title: str) -> Figure:
    """Images by true and by predicted class; a cell's colour is its share of the row."""
    drawn = _with_most_mistakes(scores.confusion)
    part = scores.confusion[np.ix_(drawn, drawn)]
    names = [_short(classes[n]) for n in drawn]
    side, label = max(2.4, 0.5 * len(drawn)), 0.085 * max(map(len, names))
    note = f"{scores.images} images, {100 * scores.accuracy:.1f} % of them right."
    if len(drawn) < len(classes):
        note += f" {len(drawn)} of {len(classes)} classes, those with the most mistakes."
    figure = titled(
        title, f"{note}\nColours: share of the row.", (side + label + 2.4, side + label + 2)
    )
    axes = figure.subplots()
    shares = part / np.maximum(scores.confusion.sum(1)[drawn], 1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(part):
        if count:
            colour = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    ticks = range(len(drawn))
    axes.set_xticks(ticks, names, rotation=90 if len(drawn) > 4 else 0)
    axes.set_yticks(ticks, names)
    axes.set_xlabel("predicted", color=PALE)
    axes.set_ylabel("true", color=PALE)
    axes.spines[:].set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    return figure


def _with_most_mistakes(confusion: np.ndarray) -> np.ndarray:
    """The classes to draw, ascending."""
    if len(confusion) <= LARGEST:
        return np.arange(len(confusion))
    hits = confusion.diagonal()
    mistakes = confusion.sum(0) + confusion.sum(1) - 2 * hits
    return np.sort(np.argsort(-mistakes, kind="stable")[:LARGEST])


def draw_mistakes(worst: Sequence[Prediction], total: int, classes: Sequence[str]) -> Figure:
    """A sheet of the images that are wrong with the highest probability, `worst` of `total`."""
    columns, rows = min(COLUMNS, len(worst)), -(-len(worst) // COLUMNS)
    some = f"{len(worst)} of {total} mistakes" if len(worst) < total else f"All mistakes: {total}"
    note = "File, true class, predicted class and its probability.\nThe highest probability first."
    figure = titled(some, note, (max(4.5, 1.9 * columns), 2.5 * rows + 1))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, prediction in zip(figure.axes, worst, strict=False):
        _draw_mistake(axes, prediction, classes)
    return figure


def _draw_mistake(axes: Axes, prediction: Prediction, classes: Sequence[str]) -> None:
    label, probability = prediction.top(1)[0]
    path, true = prediction.image
    assert true is not None  # else it could not be wrong
    axes.imshow(ImageOps.pad(read_image(path), (THUMBNAIL, THUMBNAIL), color="white"))
    names = _short(path.name), _short(classes[true]), _short(classes[label])
    axes.set_title(
        "{}\n{}, taken for\n{} ({:.0f} %)".format(*names, 100 * probability), fontsize=8, color=INK
    )


def _short(name: str) -> str:
    return plain(name if len(name) <= _NAME else name[: _NAME - 3] + "...")
