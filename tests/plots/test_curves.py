"""The curves of runs: what is drawn, and what is refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from irpe_ds.config_sections import WandbConfig
from irpe_ds.errors import ConfigError
from irpe_ds.plots.curves import Rows, _spread, draw_curves, read_runs
from irpe_ds.plots.seeds import common_name, group_seeds, one_each
from irpe_ds.runlog import RunLog
from launch import curves

SCRIPT = Path(__file__).parents[2] / "launch/curves.py"


def make_run(
    folder: Path, *, evaluated: bool = True, last_loss: float = 2.0, step: float = 30.0
) -> Path:
    with RunLog(folder, name="x", config={}, wandb=WandbConfig().model_dump()) as log:
        for update in range(1, 5):
            loss = last_loss if update == 4 else 6.0 / update
            log.log("train", update, {"loss": loss, "lr": 1e-3 / update, "epoch": update / 2})
        if evaluated:
            for epoch in (1, 2):
                scores = {"loss": 3.0 / epoch, "top1": step * epoch, "top5": 90.0, "epoch": epoch}
                log.log("eval", 2 * epoch, scores)
    return folder


def with_config(folder: Path, seed: int, **more: object) -> Path:
    """The folder with a config.yaml."""
    config = {"name": folder.name, "seed": seed, "train": {"epochs": 2}, **more}
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML
    return folder


def each(folders: list[Path], axis: str) -> dict[str, list[Rows]]:
    return one_each(read_runs(folders, axis))


def draw(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, arguments)])
    curves.main()


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_png_of_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "deep/er/curves.png"
    draw(monkeypatch, *(make_run(tmp_path / name) for name in names), "--out", out)
    height, width, _ = imread(out).shape
    assert 1400 < width < 1600
    assert 1000 < height < 1400
    assert imread(out)[..., :3].std() > 0.05


def test_vector_figures_keep_their_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = [tmp_path / "x.svg", tmp_path / "x.pdf"]
    draw(monkeypatch, make_run(tmp_path / "a"), "--out", out[0], "--out", out[1])
    assert ">Validation accuracy</text>" in out[0].read_text()
    assert b"/FontFile2" in out[1].read_bytes()  # TrueType, not outlines as Type 3


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("$\\frac$", "\x1b[2J", "a$b")]
    figure = draw_curves(each(folders, "epoch"), "epoch")
    figure.savefig(tmp_path / "x.png")
    names = [text.get_text() for text in figure.legends[0].texts]
    best = ": best top-1 60.0 % at epoch 2"
    assert names == [name + best for name in (r"\$\frac\$", r"\x1b[2J", r"a\$b")]


def test_a_place_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "update": 9, "loss": 1e300, "epoch": "inf"}\n')
    figure = draw_curves(each([folder], "epoch"), "epoch")
    figure.savefig(tmp_path / "x.png")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.5, 1.0, 1.5, 2.0]


def test_panels_hold_the_curves_by_name(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", last_loss=1.234)]
    figure = draw_curves(each(folders, "update"), "update")
    loss, validation, accuracy, rate = figure.axes
    names = [text.get_text().split(":")[0] for text in figure.legends[0].texts]
    assert names == ["a", "b"]
    assert {text.get_text() for text in loss.texts} == {"2.000", "1.234"}
    assert list(validation.lines[0].get_ydata()) == [3.0, 1.5]
    assert [text.get_text() for text in accuracy.texts].count("60.0") == 2
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert list(rate.lines[0].get_ydata()) == [1e-3, 5e-4, 1e-3 / 3, 2.5e-4]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "update", "update"]
    assert all(axes.get_ylabel() for axes in figure.axes)


def test_run_without_evaluation_and_with_a_lost_loss(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", evaluated=False, last_loss=math.nan)
    figure = draw_curves(each([folder], "epoch"), "epoch")
    loss, rate = figure.axes
    assert loss.get_title("left") == "Training loss"
    assert rate.get_title("left") == "Learning rate"
    assert [text.get_text() for text in loss.texts] == ["nan"]


def test_scores_without_top_5_are_drawn_without_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", evaluated=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "update": 4, "loss": 1.0, "top1": 60.0, "epoch": 2}\n')
    accuracy = draw_curves(each([folder], "update"), "update").axes[2]
    assert [text.get_text() for text in accuracy.texts] == ["60.0"]
    assert accuracy.get_legend() is None


def test_the_best_evaluation_is_marked_and_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        for epoch, loss, top1 in ((3, 0.5, "nan"), (4, 0.7, 59.0), (5, 0.8, 60.0)):
            row = {"kind": "eval", "update": 2 * epoch, "epoch": epoch, "loss": loss, "top1": top1}
            file.write(json.dumps(row) + "\n")
    figure = draw_curves(each([folder], "epoch"), "epoch")
    stars = [
        (axes.get_title("left"), *line.get_xdata(), *line.get_ydata())
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == "*"
    ]
    assert stars == [("Validation loss", 3, 0.5), ("Validation accuracy", 2, 60.0)]
    assert figure.legends[0].texts[0].get_text() == "a: best top-1 60.0 % at epoch 2"


def test_runs_that_differ_in_their_seed_are_mean_and_band(tmp_path: Path) -> None:
    folders = [
        with_config(make_run(tmp_path / f"k-seed{n}", step=step), n, log={"tensorboard": n > 1})
        for n, step in ((1, 30.0), (2, 33.0), (3, 36.0))
    ]
    folders.append(with_config(make_run(tmp_path / "plain"), 1, model={"rpe": None}))
    groups = group_seeds(read_runs(folders, "epoch"))
    assert list(groups) == ["k, 3 seeds", "plain"]
    figure = draw_curves(groups, "epoch")
    accuracy = figure.axes[2]
    assert list(accuracy.lines[0].get_ydata()) == [33.0, 66.0]
    (band, _) = (collection.get_paths()[0].vertices for collection in accuracy.collections)
    assert {*band[:, 1]} == {30.0, 36.0, 60.0, 72.0}  # deviations of 3 and 6
    assert figure.legends[0].texts[0].get_text() == (
        "k, 3 seeds: best top-1 66.0 ± 6.0 % at epoch 2"
    )


def test_runs_of_the_same_seed_or_of_unknown_configuration_stay_apart(tmp_path: Path) -> None:
    same = [with_config(make_run(tmp_path / name), 7) for name in ("before", "after")]
    unknown = [make_run(tmp_path / name) for name in ("x", "y")]
    groups = group_seeds(read_runs([*same, *unknown], "epoch"))
    assert list(groups) == ["before", "after", "x", "y"]


def test_a_mean_lies_between_points_where_runs_have_others() -> None:
    rows = [
        [{"kind": "train", "update": u, "loss": float(u)} for u in (2, 4)],
        [{"kind": "train", "update": u, "loss": 4.0} for u in (1, 3, 9)],
    ]
    (loss,) = draw_curves({"x": rows}, "update").axes
    assert list(loss.lines[0].get_xdata()) == [2, 3, 4]
    assert list(loss.lines[0].get_ydata()) == [3.0, 3.5, 4.0]
    with pytest.raises(ConfigError, match="differ only in their seed have no epoch in common"):
        draw_curves({"x": rows}, "epoch")


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("mine-0", "mine-1"), "mine"),
        (("k_seed_10", "k_seed_11"), "k_seed_1"),
        (("deit-s", "deit-s-1"), "deit-s"),
        (("seed1", "seed2"), "seed1"),
        (("a", "b"), "a"),
    ],
)
def test_a_group_has_what_its_names_have_in_common(names: tuple[str, ...], name: str) -> None:
    assert common_name(names) == name


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
    with pytest.raises(ConfigError, match=r"ends in \.png, \.pdf, \.svg, got .*/a\.jpg"):
        draw(monkeypatch, make_run(tmp_path / "a"), "--out", tmp_path / "a.jpg")


def test_mistakes_end_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "none/metrics.jsonl: expected a readable metrics file" in result.stderr
    assert "Traceback" not in result.stderr
