"""One folder of images, as a newcomer has it: trained with folder.yaml, resumed, predicted."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from irpe_ds.config import load_config
from irpe_ds.errors import ExitCode
from tests.launch.ranks import Ranks, rows

ROOT = Path(__file__).parents[2]

RECIPE = "launch/configs/folder.yaml"
CLASSES = ["one", "three", "two"]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def photos(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each of three digits."""
    folder = tmp_path_factory.mktemp("newcomer") / "photos"
    for name, digit in zip(CLASSES, "132", strict=True):
        (folder / name).mkdir(parents=True)
        for image in sorted((digits / "val" / digit).iterdir())[:10]:
            shutil.copy(image, folder / name)
    return folder


@pytest.fixture(scope="module")
def overrides(photos: Path) -> list[str]:
    small = (
        "model.pretrained=false",
        "model.img_size=32",
        "model.options={depth: 1, embed_dim: 32, num_heads: 2}",
    )
    length = ("train.epochs=3", "train.log_every=1", "data.workers=1")
    return [f"output={photos.parent}", "name=run", f"data.train={photos}", *small, *length]


@pytest.fixture(scope="module")
def trained(photos: Path, overrides: list[str]) -> Path:
    """The folder of a run on two ranks that was stopped and resumed."""
    first = [*overrides, "train.max_updates=1"]
    Ranks(photos.parent, 2, [(first, "never", RECIPE), (overrides, "auto", RECIPE)]).succeed()
    return photos.parent / "run"


def test_the_folder_was_converted_counted_and_shared(trained: Path, photos: Path) -> None:
    config = load_config(trained / "config.yaml")
    assert config.data.train == photos.with_suffix(".beton")
    assert config.model.num_classes == 3
    assert json.loads((trained / "classes.json").read_text()) == CLASSES
    val = json.loads((trained / "val_images.json").read_text())
    assert [name.split("/")[0] for name in val] == [name for name in CLASSES for _ in range(2)]
    assert all((photos / name).is_file() for name in val)
    assert [row["update"] for row in rows(trained, "train")] == [1, 2, 3]
    assert rows(trained, "eval")[-1]["images"] == 6


@pytest.mark.parametrize(("bad", "writes"), [(0, True), (1, True), (1, False)])
def test_it_predicts(
    bad: int,
    writes: bool,
    trained: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for number in range(bad):
        (tmp_path / "photos" / "one" / f"bad{number}.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    words = ["--model", str(trained), str(tmp_path / "photos"), *["--out", str(out)][: 2 * writes]]
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["launch/predict.py", *words])
    code = 0
    try:
        runpy.run_path(str(ROOT / "launch/predict.py"), run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code
    assert code == (ExitCode.MISTAKE if bad else ExitCode.DONE)
    printed = capsys.readouterr()
    assert " of 30 images of known classes are predicted right" in printed.out
    assert ("error: 1 of 31 images cannot be read" in printed.err) == bool(bad)
    if not writes:
        assert f"{tmp_path / 'photos' / 'one' / 'bad0.jpg'}: not a JPEG" in printed.out
        assert {*tmp_path.iterdir()} == before
        return
    found = json.loads((out / "predictions.json").read_text())
    assert found["classes"] == CLASSES
    assert len(found["images"]) == 30 + bad
    assert sum(map(sum, found["scores"]["confusion"])) == 30
    assert {"predictions.csv", "confusion.png"} <= {path.name for path in out.iterdir()}


def test_it_is_not_resumed_on_another_split(
    trained: Path, photos: Path, overrides: list[str], tmp_path: Path
) -> None:
    """As many images, and others: the new ones may be of those that were trained with."""
    for number, name in enumerate(CLASSES):
        first, *_ = sorted((photos / name).iterdir())
        first.rename(photos / name / f"z{number}.png")
    ranks = Ranks(tmp_path, 1, [([*overrides, "train.epochs=4"], "auto", RECIPE)])
    assert ranks.wait() == [ExitCode.MISTAKE]
    assert "val_images.json: expected the data to have the validation images" in ranks.output()
