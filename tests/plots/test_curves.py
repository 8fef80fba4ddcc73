"""The curves of runs: what is drawn, and what is refused."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from irpe_ds.config import WandbConfig
from irpe_ds.errors import ConfigError
from irpe_ds.plots.curves import _spread, draw_curves, read_runs
from irpe_ds.runlog import RunLog
from launch import curves

SCRIPT = Path(__file__).parents[2] / "launch/curves.py"


def make_run(
    folder: Path, *, evaluated: bool = True, last_loss: float = 2.0, top5: float = 90.0
) -> Path:
    with RunLog(folder, name="x", config={}, wandb=WandbConfig().model_dump()) as log:
        for update in range(1, 5):
            loss = last_loss if update == 4 else 6.0 / update
            log.log("train", update, {"loss": loss, "lr": 1e-3 / update, "epoch": update / 2})
        if evaluated:
            for epoch in (1, 2):
                log.log("eval", 2 * epoch, {"top1": 30.0 * epoch, "top5": top5, "epoch": epoch})
    return folder


def draw(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, arguments)])
    curves.main()


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_png_of_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "deep/er/curves.png"
    draw(monkeypatch, *(make_run(tmp_path / name) for name in names), "--out", out)
    height, width, _ = imread(out).shape
    assert 1500 < width < 2500
    assert 500 < height < 900
    assert imread(out)[..., :3].std() > 0.05


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("$\\frac$", "\x1b[2J", "a$b")]
    figure = draw_curves(read_runs(folders, "epoch"), "epoch")
    figure.savefig(tmp_path / "x.png")
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == [r"\$\frac\$", r"\x1b[2J", r"a\$b"]


def test_a_place_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "update": 9, "loss": 1e300, "epoch": "inf"}\n')
    figure = draw_curves(read_runs([folder], "epoch"), "epoch")
    figure.savefig(tmp_path / "x.png")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.5, 1.0, 1.5, 2.0]


def test_panels_hold_the_curves_by_name(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", last_loss=1.234)]
    figure = draw_curves(read_runs(folders, "update"), "update")
    loss, accuracy, rate = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]
    assert {text.get_text() for text in loss.texts} == {"2.000", "1.234"}
    assert [text.get_text() for text in accuracy.texts].count("60.0") == 2
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert list(rate.lines[0].get_ydata()) == [1e-3, 5e-4, 1e-3 / 3, 2.5e-4]
    assert all(axes.get_xlabel() == "update" and axes.get_ylabel() for axes in figure.axes)


def test_run_without_evaluation_and_with_a_lost_loss(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", evaluated=False, last_loss=math.nan)
    figure = draw_curves(read_runs([folder], "epoch"), "epoch")
    loss, rate = figure.axes
    assert loss.get_title("left") == "Training loss"
    assert rate.get_title("left") == "Learning rate"
    assert [text.get_text() for text in loss.texts] == ["nan"]


def test_top_5_of_five_classes_is_left_out(tmp_path: Path) -> None:
    figure = draw_curves(read_runs([make_run(tmp_path / "a", top5=100.0)], "update"), "update")
    accuracy = figure.axes[1]
    assert [text.get_text() for text in accuracy.texts] == ["60.0"]


def test_runs_of_one_name_are_told_apart_by_path(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "x/run"), make_run(tmp_path / "y/run")]
    assert list(read_runs(folders, "epoch")) == [str(folder) for folder in folders]


def test_values_written_at_the_side_do_not_overlap() -> None:
    assert _spread([0.9, 0.1], 0.1) == pytest.approx([0.9, 0.1])
    assert _spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert _spread([0.52, 0.5, 0.0], 0.1) == pytest.approx([0.56, 0.46, 0.0])


def test_missing_and_empty_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/metrics\.jsonl: expected a readable"):
        draw(monkeypatch, tmp_path / "none")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        ConfigError, match="rows of training or evaluation by epoch, got none among 0"
    ):
        draw(monkeypatch, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "update": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match="by epoch, got none among 1"):
        draw(monkeypatch, tmp_path)
    draw(monkeypatch, tmp_path, "--x", "update", "--out", tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"\.png"):
        draw(monkeypatch, make_run(tmp_path / "a"), "--out", tmp_path / "a.pdf")


def test_mistakes_end_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "none/metrics.jsonl: expected a readable metrics file" in result.stderr
    assert "Traceback" not in result.stderr
