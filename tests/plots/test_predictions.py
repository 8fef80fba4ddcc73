"""The pictures of launch/predict.py."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_ds.plots.predictions import LARGEST, draw_confusion, draw_mistakes
from irpe_ds.prediction import ImageFile, Prediction, Scores


def test_every_count_is_written(tmp_path: Path) -> None:
    scores = Scores(np.array([[3, 1], [0, 4]]))
    figure = draw_confusion(scores, ("cat", "$dog$"), "Confusion matrix")
    figure.savefig(tmp_path / "confusion.png")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["3", "1", "4"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", r"\$dog\$"]
    assert "87.5 % of them right" in figure.texts[-1].get_text()


def test_of_many_classes_those_with_mistakes_are_drawn() -> None:
    confusion = np.eye(1000, dtype=np.int64)
    confusion[700, 800] = 5
    figure = draw_confusion(Scores(confusion), [str(n) for n in range(1000)], "")
    drawn = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(drawn) == LARGEST
    assert {"700", "800"} <= {*drawn}
    assert f"{LARGEST} of 1000 classes" in figure.texts[-1].get_text()


@pytest.mark.parametrize(("count", "total"), [(1, 1), (7, 30)])
def test_mistakes_are_shown_with_their_names(count: int, total: int, tmp_path: Path) -> None:
    Image.new("RGB", (40, 10)).save(tmp_path / "a.png")
    image = ImageFile(tmp_path / "a.png", 0)
    wrong = Prediction(image, np.array([0.25, 0.75], np.float32))
    figure = draw_mistakes([wrong] * count, total, ("cat", "dog"))
    figure.savefig(tmp_path / "mistakes.png")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["a.png\ncat, taken for\ndog (75 %)"] * count
