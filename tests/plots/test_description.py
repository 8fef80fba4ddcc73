"""data_prep/describe.py: text, pictures and the report of a folder of images."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import describe as script
from irpe_ds.data.description import Description, describe
from irpe_ds.data.pipelines.timm import open_images
from irpe_ds.errors import ConfigError
from irpe_ds.plots import views
from irpe_ds.plots.description import draw_description
from irpe_ds.plots.sheet import Row, Tile, draw_sheet
from irpe_ds.plots.style import pixels
from irpe_ds.plots.views import BY_ROW, ROWS, SHOWN, VIEWED, draw_classes, draw_views

RECIPE = """
name: x
model: {name: vit_tiny_patch16_224, num_classes: 7, img_size: 16}
augment: {auto: 3a, mixup: 1.0, mix_prob: 1.0, label_smoothing: 0.0}
train: {precision: fp32}
"""


def make(root: Path, classes: int, each: int) -> Path:
    for name in range(classes):
        (root / f"c{name:03d}").mkdir(parents=True)
        for number in range(each):
            image = Image.new("RGB", (20 + number, 30), (name % 256, 100, 200))
            image.save(root / f"c{name:03d}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pictures") / "data", 3, 4)


@pytest.fixture(scope="module")
def found(folder: Path) -> Description:
    return describe(open_images(folder, "FILE"), count=100, seed=0, workers=1)


@pytest.fixture(autouse=True)
def two_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each image, for the time that processes take to start."""
    monkeypatch.setattr(views, "EPOCHS", 2)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["describe.py", *map(str, words)])
    script.main()


def test_the_report_holds_everything(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (recipe := tmp_path / "x.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    call(monkeypatch, folder, "--out", out, "--config", recipe, "--workers", 1)
    names = ["description.png", "classes.png", "views.png"]
    printed = capsys.readouterr().out
    assert printed.split()[-4:] == [str(out / name) for name in [*names, "report.html"]]
    assert "12 images of 3 classes" in printed
    assert re.search(r"\ndata:\n  mean: \[0\.0039, 0\.3922, 0\.7843\]\n  std: \[", printed)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "c002" in page
    assert "<details open>" in page
    assert "src=" not in page.replace('src="data:image/png;base64,', "")  # needs no other file
    assert not re.search("https?://", page)
    call(monkeypatch, folder, "--out", out)  # without views: those of the last call go
    assert not (out / "views.png").exists()
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", 0], "--images: expected at least 1, got 0"),
        (["--seed", -1], "--seed: expected at least 0, got -1"),
        (["--workers", 0], "--workers: expected at least 1, got 0"),
        (["model.name=x"], "section.key=value: expected --config before it, got model.name=x"),
    ],
)
def test_mistakes(
    words: list[object], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        call(monkeypatch, folder, *words)
    assert str(caught.value) == message


@pytest.mark.parametrize("count", [2, 25, 1000])
def test_any_number_of_classes_is_legible(count: int, found: Description) -> None:
    names, counts = [f"${n}$ name" for n in range(count)], np.arange(count) + 1
    figure = draw_description(replace(found, classes=names, counts=counts))
    assert pixels(figure).std() > 10
    axes = figure.axes[0]
    if count <= 25:
        assert len(axes.patches) == count
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert labels[0] == rf"\${count - 1}\$ name"
    else:
        ends = [text.get_text() for text in axes.texts]
        assert ends == [rf"largest: \${count - 1}\$ name, {count:,}", r"smallest: \$0\$ name, 1"]


@pytest.mark.parametrize(("classes", "each"), [(2, 12), (BY_ROW, 2), (SHOWN + 5, 1)])
def test_images_of_classes(classes: int, each: int, tmp_path: Path) -> None:
    images = open_images(make(tmp_path / "data", classes, each), "FILE")
    figure = draw_classes(images, seed=0)
    (axes,) = figure.axes
    shown = {tuple(image.get_array()[0, 0]) for image in axes.images}
    if classes > BY_ROW:
        assert figure.get_suptitle() == f"{SHOWN} of {SHOWN + 5} classes, an image of each"
        assert len(axes.images) == len(shown) == SHOWN
    else:
        assert len(axes.images) == classes * min(each, 10 * ROWS)
        assert len(shown) == classes
        names = {text.get_text() for text in axes.texts} - {""}
        assert names == {f"c{n:03d}\n{each}" for n in range(classes)}


def test_a_damaged_image_has_its_place() -> None:
    figure = draw_sheet("x", "y", [Row("", [Tile(None, "$a$"), Tile(np.zeros((4, 2, 3)), "b")])])
    (axes,) = figure.axes
    assert len(axes.images) == 1
    assert [text.get_text() for text in axes.texts if text.get_text()] == [
        *(r"\$a\$", "damaged", "b")
    ]
    left, right, bottom, top = axes.images[0].get_extent()
    assert (right - left, bottom - top) == pytest.approx((0.5, 1))  # its shape is kept


def test_views_are_those_of_training(folder: Path, tmp_path: Path) -> None:
    (recipe := tmp_path / "x.yaml").write_text(RECIPE)
    config = script.read_recipe(recipe, folder, ["augment.mixup=0"])
    assert (config.data.pipeline, config.model.num_classes) == ("timm", "auto")
    images = open_images(folder, "FILE")
    first, again = (draw_views(images, config, recipe).axes[0] for _ in range(2))
    assert len(first.images) == VIEWED * 3
    for one, other in zip(first.images, again.images, strict=True):
        assert np.array_equal(one.get_array(), other.get_array())
    texts = [text.get_text() for text in first.texts if text.get_text()]
    assert texts[:3] == ["stored", "epoch 0", "epoch 1"]
    assert {*texts[3:]} <= {"c000", "c001", "c002"}
    mixed = draw_views(images, script.read_recipe(recipe, folder, []), recipe)
    assert "Mixed among these images." in mixed.texts[-1].get_text()
    labels = "\n\n".join(text.get_text() for text in mixed.axes[0].texts)
    assert re.search(r"c00\d 0\.\d\d\nc00\d 0\.\d\d", labels)
