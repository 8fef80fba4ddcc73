"""data_prep/digits.py."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[2] / "data_prep" / "digits.py"


def run_script(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["digits.py", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits"
    run_script(out, monkeypatch)
    assert "wrote 1438 training and 359 validation images" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    digits = load_digits()
    files = {int(path.stem): path for path in out.rglob("*.jpg")}
    assert sorted(files) == list(range(1797))
    for index, path in files.items():
        assert path.parent.name == str(digits.target[index])
    for digit in range(10):
        share = len(list((out / "val" / str(digit)).iterdir())) / (digits.target == digit).sum()
        assert share == pytest.approx(0.2, abs=0.003)
    with Image.open(files[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        blocks = np.asarray(image.convert("L"), float).reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), digits.images[0].ravel())[0, 1] > 0.97

    before = {path: path.stat().st_mtime_ns for path in files.values()}
    run_script(out, monkeypatch)
    assert "already exist" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files.values()} == before

    files[0].unlink()
    with pytest.raises(SystemExit) as exit_:
        run_script(out, monkeypatch)
    assert exit_.value.code == 2
    assert "expected a new or a complete folder" in capsys.readouterr().err
