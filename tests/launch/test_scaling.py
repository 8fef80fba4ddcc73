"""A scaling experiment as a user runs it: real ranks, killed in between, reported from its file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from irpe_ds.benchmark.rows import PHASES
from irpe_ds.config import load_config
from irpe_ds.planner.deepspeed import collectives
from irpe_ds.planner.profile import profile
from irpe_ds.planner.zero import read_zero
from tests.launch.conftest import ROOT, Run
from tests.planner.conftest import QUICKSTART, cluster

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STAGES = ("zero1", "zero3")


@pytest.fixture(scope="module")
def experiment(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line: three cells, of which the last cannot run."""
    folder = tmp_path_factory.mktemp("scaling")
    files = [f"ds_configs/{stage}.json" for stage in STAGES]
    matrix = [
        {"ranks_per_node": 2, "train.deepspeed": files, "micro_batch": 4},
        {"model.weights": str(folder / "nowhere.pth"), "micro_batch": 4},
    ]
    data = {part: str(digits / f"{part}.beton") for part in ("train", "val")}
    values = {
        "base": str(ROOT / QUICKSTART),
        "name": "test",
        "output": str(folder),
        "data": {**data, "workers": 1},
        "train": {"profile": 1},
        "log": {"wandb": {"mode": "offline"}},
        "scaling": {"matrix": matrix, "updates": 4, "repeats": 3},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, "launch/scaling.py", "--config", str(path)]


@pytest.fixture(scope="module")
def rows(experiment: list[str], run: Run) -> list[dict[str, Any]]:
    """What it gives, after it was killed in its second cell and called again."""
    folder = Path(experiment[-1]).parent / "test"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    process = subprocess.Popen(experiment, cwd=ROOT, env=environment)
    end = time.monotonic() + 600
    while len(list(folder.glob("cells/*/metrics.jsonl"))) < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 143
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == 1
    again = run(*experiment)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(known)") == 1
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    return found


def test_a_cell_says_what_was_fast_and_where_time_went(rows: list[dict[str, Any]]) -> None:
    assert [row.get("stage") for row in rows] == [1, 3, 1]
    for row in rows[:2]:
        speeds = [row[f"{which}images_per_s"] for which in ("slowest_", "", "fastest_")]
        assert 0 < speeds[0] <= speeds[1] <= speeds[2]
        assert row["images_per_s"] == pytest.approx(1000 * row["global_batch"] / row["step_ms"])
        assert all(row[f"{phase}_ms"] > 0 for phase in PHASES)
        assert sum(row[f"{phase}_ms"] for phase in PHASES) == pytest.approx(row["apart_ms"])
        assert row["memory_gib"] > 0.1
        assert (row["impl"], row["device"]) == ("cpu", "CPU")
        assert row["slowest_rank"] == row["rank_ms"].index(max(row["rank_ms"]))
        busy = sum(row[f"{phase}_ms"] for phase in PHASES if phase != "communication")
        assert sum(row["rank_ms"]) == pytest.approx(2 * busy)


def test_links_are_tested_and_every_rank_leaves_a_trace(
    experiment: list[str], rows: list[dict[str, Any]]
) -> None:
    folder = Path(experiment[-1]).parent / "test"
    links = json.loads((folder / "results.json").read_text())["links"]["rows"]
    assert {(row["collective"], row["where"]) for row in links} == {
        ("all_reduce", "intra"),
        ("all_gather", "intra"),
    }
    for row in rows[:2]:
        traces = folder / "cells" / row["key"] / "traces"
        assert {path.name for path in traces.iterdir()} == {"rank-0.json.gz", "rank-1.json.gz"}


def test_bytes_are_those_that_the_planner_counts(rows: list[dict[str, Any]]) -> None:
    counted = profile(load_config(QUICKSTART))
    for row, stage in zip(rows, STAGES, strict=False):
        zero = read_zero(ROOT / f"ds_configs/{stage}.json")
        for send in collectives(counted, zero, cluster(2), 1):
            norms = 100  # a few numbers of the gradient's norm and of overflows
            assert row[f"{send.kind}_bytes"] == pytest.approx(send.payload, rel=5e-4, abs=norms)


def test_a_cell_that_fails_is_a_row(rows: list[dict[str, Any]]) -> None:
    assert "nowhere.pth" in rows[2]["error"]


def test_cells_are_a_group_of_w_and_b(experiment: list[str], rows: list[dict[str, Any]]) -> None:
    folder = Path(experiment[-1]).parent / "test/cells"
    sent = list(folder.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert len(sent) == 2
    assert all(b"test" in path.read_bytes() for path in sent)


def test_report_is_made_from_the_file_alone(
    rows: list[dict[str, Any]], experiment: list[str], run: Run, tmp_path: Path
) -> None:
    file = Path(experiment[-1]).parent / "test/results.json"
    (tmp_path / "results.json").write_bytes(file.read_bytes())
    done = run(sys.executable, "launch/scaling.py", "--report", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.html")
    assert (tmp_path / "results.csv").read_bytes() == (file.parent / "results.csv").read_bytes()
