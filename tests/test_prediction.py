"""Classifying image files: what is found, read and scored."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.prediction import (
    ImageFile,
    Prediction,
    find_images,
    predict,
    score,
    to_csv,
    to_json,
    worst_mistakes,
)

CLASSES = ("dark", "grey", "light")


class ByBrightness(nn.Module):
    """Logits of CLASSES from the mean of an image: a model that is right, and never quite sure."""

    def forward(self, images: Tensor) -> Tensor:
        centres = torch.tensor([0.0, 0.5, 1.0], device=images.device)
        return -20 * (images.mean(dim=(1, 2, 3))[:, None] - centres) ** 2


def transform(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1) / 255


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two right images of `dark` and `light`, one of them deep inside, and a dark one in `grey`."""
    root = tmp_path / "photos"
    for name, grey in (("dark/a.png", 3), ("light/x/b.jpg", 250), ("grey/c.png", 20)):
        path = root / name
        path.parent.mkdir(parents=True)
        Image.new("L", (5, 4), grey).save(path)
    (root / "notes.txt").write_text("no image")
    (root / "grey" / "broken.jpg").write_bytes(b"no image")
    return root


def found(paths: list[Path]) -> list[tuple[str, int | None]]:
    return [(image.path.name, image.label) for image in find_images(paths, CLASSES)]


def predictions(photos: Path, batch_size: int = 2) -> list[Prediction]:
    images = find_images([photos], CLASSES)
    device = torch.device("cpu")
    options = {"batch_size": batch_size, "workers": 1}
    return list(predict(ByBrightness(), transform, images, **options, device=device))


def test_images_and_their_classes_are_found(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [("a.png", 0), ("broken.jpg", 1), ("c.png", 1), ("b.jpg", 2)]
    assert found([photos]) == everything
    assert found([photos / "light", photos / "dark" / "a.png"]) == [("b.jpg", 2), ("a.png", 0)]
    (photos / "grey" / "loop").symlink_to(photos)
    assert len(found([photos])) == 4
    monkeypatch.chdir(photos / "light" / "x")
    assert found([Path("b.jpg"), Path()]) == [("b.jpg", None), ("b.jpg", None)]
    (photos / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"expected at least one, got none in .*empty$"):
        found([photos / "empty"])


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_a_bad_image_is_an_error_among_the_others(photos: Path, batch_size: int) -> None:
    names = [
        (p.image.path.name, p.top(1)[0][0] if p.top(1) else p.error) for p in predictions(photos)
    ]
    bad = "not a JPEG, PNG, BMP, PPM, TIFF or WebP image"
    assert names == [("a.png", 0), ("broken.jpg", bad), ("c.png", 0), ("b.jpg", 2)]


def test_scores(photos: Path) -> None:
    scores = score(predictions(photos), 3)
    assert scores is not None
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert (scores.images, scores.accuracy) == (3, 2 / 3)
    assert scores.of_class(0) == {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "images": 1}
    assert scores.of_class(1) == {"precision": None, "recall": 0.0, "f1": 0.0, "images": 1}
    unknown = [p._replace(image=p.image._replace(label=None)) for p in predictions(photos)]
    assert score(unknown, 3) is None


def test_the_worst_mistakes_come_first() -> None:
    def wrong(name: str, probability: float) -> Prediction:
        rest = 1 - probability
        return Prediction(ImageFile(Path(name), 0), np.array([rest, probability], np.float32))

    rows = [wrong("a", 0.6), wrong("b", 0.9), wrong("right", 0.1), wrong("c", 0.7)]
    rows.append(Prediction(ImageFile(Path("bad"), 0), None, "bad"))
    rows.append(rows[1]._replace(image=ImageFile(Path("unknown"), None)))
    assert [str(p.image.path) for p in worst_mistakes(rows, 2)] == ["b", "c"]


def test_files(photos: Path) -> None:
    done = predictions(photos)
    rows = list(csv.DictReader(io.StringIO(to_csv(done, CLASSES, 2))))
    assert [row["true_class"] for row in rows] == ["dark", "grey", "grey", "light"]
    assert [row["class_1"] for row in rows] == ["dark", "", "dark", "light"]
    assert rows[1]["error"].startswith("not a JPEG")
    assert 0.5 < float(rows[0]["probability_1"]) < 1
    text = json.dumps(to_json(done, CLASSES, 2, score(done, 3)))
    values = json.loads(text)
    assert values["images"][3]["top"][0]["class"] == "light"
    assert len(values["images"][3]["top"]) == 2
    assert values["images"][1]["top"] == []
    assert values["scores"]["classes"]["dark"]["precision"] == 0.5
    assert to_json(done, CLASSES, 2, None)["scores"] is None
