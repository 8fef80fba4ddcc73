"""Images with labels, and the scores of classes."""

import numpy as np

from irpe_ds.plots.classes import class_rows, draw_confusion, draw_images
from irpe_ds.plots.style import pixels

COUNTS = np.array([[6, 3, 1], [0, 5, 0], [0, 0, 0]])
NAMES = ["cat", "dog", "an elephant with a long name"]


def test_every_image_stands_under_its_label() -> None:
    images = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((5, 8, 6, 3))
    figure = draw_images(images, ["cat", "dog", "cat 0.60\ndog 0.40", "$x$", "x" * 99])
    shown = [axes for axes in figure.axes if axes.images]
    labels = [axes.get_title() for axes in shown]
    assert labels == ["cat", "dog", "cat 0.60\ndog 0.40", r"\$x\$", "x" * 18]
    assert [float(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [0, 0.25, 0.5, 0.75, 1]
    picture = pixels(figure)
    assert (picture.dtype, picture.shape[2]) == (np.uint8, 3)
    assert picture.std() > 30


def test_a_confusion_matrix_has_shares_as_colours_and_counts_as_text() -> None:
    figure = draw_confusion(COUNTS, NAMES, "mine")
    axes = figure.axes[0]
    assert np.array_equal(axes.images[0].get_array(), [[60, 30, 10], [0, 100, 0], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == ["6", "3", "1", "5"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["cat", "dog", "an elephant..."]
    assert figure.get_suptitle() == "mine: 73.33 % of 15 images"


def test_many_classes_have_no_text() -> None:
    figure = draw_confusion(np.eye(100, dtype=int), [str(n) for n in range(100)], "mine")
    assert not figure.axes[0].texts
    assert pixels(figure).std() > 5


def test_scores_of_classes() -> None:
    assert class_rows(COUNTS, NAMES) == [
        {"class": "cat", "images": 10, "recall": 60, "precision": 100, "mostly taken for": "dog"},
        {"class": "dog", "images": 5, "recall": 100, "precision": 62.5, "mostly taken for": None},
        {
            **{"class": NAMES[2], "images": 0, "recall": None, "precision": 0},
            "mostly taken for": None,
        },
    ]
