"""Variants and seeds of an ablation, their runs, and what they come to."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from irpe_ds.benchmark import ablation
from irpe_ds.benchmark.ablation import load_ablation, run_ablation, summarise
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.plots.ablation import draw_ablation

BASE = Path("launch/configs/ablation/digits.yaml")
TRAIN = """
import json, os, sys, yaml
from pathlib import Path
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
if config["name"] == os.environ.get("FAILS"):
    sys.exit(7)
folder = Path(config["output"], config["name"])
folder.mkdir(parents=True)
score = 90 + config["seed"] + 2 * (config["model"]["rpe"] is not None)
row = {"kind": "eval", "update": 9, "epoch": 44, "top1": score, "loss": 0.5, "images": 359}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(folder / "environment.json").write_text(json.dumps({"device": "CPU", "commit": "abc"}))
"""
"""Stands in for a training: top-1 is 90, 91 ... by seed, and 2 points more with the encoding."""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return [sys.executable, str(path)]


def overrides(folder: Path, variants: str = "{plain: {model.rpe: null}, K: {}}") -> list[str]:
    return [f"output={folder}", f"ablation.variants={variants}", "ablation.seeds=[0, 1, 2]"]


def test_every_recipe_loads() -> None:
    for path in BASE.parent.glob("*.yaml"):
        common, trials = load_ablation(path)
        assert len(trials) == 30
        assert [trial.seed for trial in trials[:7]] == [0] * 6 + [1]
        assert {trial.config.output for trial in trials} == {common.folder}
        assert len({trial.config.name for trial in trials}) == 30
        none, absolute = (next(t for t in trials if t.variant == v) for v in ("none", "absolute"))
        assert none.config.model.rpe is None
        assert none.config.model.options["pos_embed"] == "none"
        assert "pos_embed" not in absolute.config.model.options


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ablation=null", "a section ablation with variants"),
        ("ablation.seeds=[0]", "ablation.seeds"),
        ("ablation.variants={one: {}}", "ablation.variants"),
        ("ablation.variants={../x: {}, b: {}}", "ablation.variants"),
        ("ablation.variants={a: {}, b: {model.nmae: x}}", "model"),
        ("ablation.seed=[0, 1]", "seed"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ablation(BASE, [override])


def test_trained_once_and_summarised(tmp_path: Path, script: list[str]) -> None:
    common, trials = load_ablation(BASE, overrides(tmp_path))
    lines: list[str] = []
    results = run_ablation(common, trials, script, 2, lines.append)
    assert json.loads((common.folder / "results.json").read_text()) == results
    assert [(row["variant"], row["seed"]) for row in results["rows"]] == [
        (variant, seed) for seed in range(3) for variant in ("plain", "K")
    ]
    assert list(map(str, summarise(results))) == [
        "plain                91.00 ± 1.00 %, n = 3",
        "K                    93.00 ± 1.00 %, n = 3, +2.00 ± 0.00 points",
    ]
    assert run_ablation(common, trials, ["false"], 1, lines.append) == results
    assert len(lines) == 12
    accuracies = {s.variant: [*s.top1.values()] for s in summarise(results)}
    axes = draw_ablation("digits", accuracies, "a note").axes[0]
    assert [text.get_text() for text in axes.texts] == ["91.00\n± 1.00", "93.00\n± 1.00"]


def test_trainings_that_end_together_write_one_after_the_other(
    tmp_path: Path, script: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common, trials = load_ablation(BASE, overrides(tmp_path))
    run_ablation(common, trials, script, 2, lambda _: None)
    writing, original = threading.Lock(), ablation.replace_file

    def replace_file(path: Path, text: str) -> None:
        assert writing.acquire(blocking=False)
        time.sleep(0.01)  # the others want to write too
        original(path, text)
        writing.release()

    monkeypatch.setattr(ablation, "replace_file", replace_file)
    assert len(run_ablation(common, trials, ["false"], 6, lambda _: None)["rows"]) == 6


def test_a_failure_is_named_and_the_rest_kept(
    tmp_path: Path, script: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common, trials = load_ablation(BASE, overrides(tmp_path))
    monkeypatch.setenv("FAILS", "plain-1")
    with pytest.raises(UserError, match=r"plain-1: the training ended with exit code 7; see .*log"):
        run_ablation(common, trials, script, 1, lambda _: None)
    rows = json.loads((common.folder / "results.json").read_text())["rows"]
    assert [row["seed"] for row in rows][:2] == [0, 0]
    assert ("plain", 1) not in [(row["variant"], row["seed"]) for row in rows]
    monkeypatch.delenv("FAILS")
    assert len(run_ablation(common, trials, script, 1, lambda _: None)["rows"]) == 6
