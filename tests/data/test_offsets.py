"""data_prep/offsets.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import offsets

IMAGES = {"train": 100, "val": 10}


def run_script(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["offsets.py", "--out", str(out)])
    monkeypatch.setattr(offsets, "IMAGES", IMAGES)
    offsets.main()


def patch_of(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Row and column of the one patch that holds every pixel of this colour."""
    pixels = np.argwhere((image == colour).all(2))
    (patch,) = np.unique(pixels // offsets.PATCH, axis=0)
    return tuple(patch)


def test_label_is_the_offset_and_the_disc_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "offsets"
    run_script(out, monkeypatch)
    assert "wrote 800 training and 80 validation images of 8 classes" in capsys.readouterr().out
    contents = set()
    for part, count in IMAGES.items():
        assert {path.name for path in (out / part).iterdir()} == set(offsets.OFFSETS)
        for name, offset in offsets.OFFSETS.items():
            files = list((out / part / name).iterdir())
            assert len(files) == count
            discs = set()
            for file in files:
                with Image.open(file) as opened:
                    image = np.asarray(opened)
                assert image.shape == (40, 40, 3)
                disc, cross = (patch_of(image, colour) for colour in (offsets.RED, offsets.BLUE))
                assert (cross[0] - disc[0], cross[1] - disc[1]) == offset
                discs.add(disc)
                contents.add(file.read_bytes())
            if part == "train":  # the same nine places in every class
                assert discs == {(row, col) for row in (1, 2, 3) for col in (1, 2, 3)}
    assert len(contents) == 880


def test_again_and_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_script(first, monkeypatch)
    run_script(second, monkeypatch)
    run_script(second, monkeypatch)
    assert "already exist" in capsys.readouterr().out
    files = sorted(path.relative_to(first) for path in first.rglob("*.png"))
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    (second / files[0]).unlink()
    with pytest.raises(offsets.ConfigError, match="a new or a complete folder"):
        run_script(second, monkeypatch)
