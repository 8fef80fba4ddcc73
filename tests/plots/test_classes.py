"""Images with labels."""

import numpy as np
import torch

from irpe_ds.plots.classes import draw_images, label_texts
from irpe_ds.plots.style import pixels


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


def test_mixed_labels_are_named_with_their_shares() -> None:
    names = ["ant", "bee", "cat"]
    assert label_texts(torch.tensor([2, 0]), names) == ["cat", "ant"]
    mixed = torch.tensor([[0.05, 0.9, 0.05], [0.0, 0.4, 0.6], [0.5, 0.5, 0.0]])
    texts = label_texts(mixed, names)
    assert texts[:2] == ["bee", "cat 0.60\nbee 0.40"]
    assert label_texts(torch.tensor([[1.0]]), ["one"]) == ["one"]
