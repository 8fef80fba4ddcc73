"""An experiment that is stopped, fails in a cell, hangs, or is called again."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.benchmark import runner
from irpe_ds.benchmark.experiment import Cell, Experiment, load_experiment
from irpe_ds.benchmark.rows import Results, read_results_file
from irpe_ds.benchmark.runner import run_experiment
from irpe_ds.errors import CheckpointError, ConfigError
from irpe_ds.training.start import lock
from tests.benchmark.test_experiment import write

STAND_IN = """
import json, sys, time
from pathlib import Path
folder, speed = Path(sys.argv[1]), float(sys.argv[2])
if speed == 0:
    sys.exit("[rank 1] error: no speed: expected one, got 0")
if speed < 0:
    time.sleep(3600)
folder.mkdir()
row = {"kind": "scaling", "update": 9, "images_per_s": speed, "step_ms": 1.0}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
packages = {"torch": "2", "deepspeed": "0"}
facts = {"attention_op": {"name": "cpu"}, "device": "CPU", "packages": packages, "commit": None}
(folder / "environment.json").write_text(json.dumps(facts))
(folder / "ranks.json").write_text('{"rank_ms": [1.0]}')
"""
"""What is started instead of ranks: logs the speed that it is given, fails, or hangs."""
LINKS = """
import json, sys
from pathlib import Path
out, _, _, *sizes = sys.argv[1:]
Path(out.removeprefix("--out=")).write_text(json.dumps([{"bytes": float(size)} for size in sizes]))
"""
"""What is started instead of the self-test of links."""

Speeds = dict[int, float]


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Speeds:
    """What cells give, by their ranks; and they are started without DeepSpeed."""
    found: Speeds = {1: 100.0, 2: 190.0}

    def command(_: Experiment, cell: Cell, __: Path) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(cell.config.folder), str(found[cell.ranks])]

    monkeypatch.setattr(runner, "command", command)
    monkeypatch.setattr(runner, "check_data", lambda config: {})
    monkeypatch.setattr(runner, "launcher", lambda *_: [sys.executable, "-c", LINKS])
    return found


def experiment(folder: Path, ranks: object = (1, 2), **scaling: Any) -> Experiment:
    path = write(folder, {"ranks_per_node": list(ranks)}, **scaling)  # type: ignore[call-overload]
    return load_experiment(path, [f"output={folder}"])


def run(*args: Any, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the experiment and what it said."""
    said: list[str] = []
    results = run_experiment(*args, say=said.append, **options)
    return list(results.rows.values()), said


def test_every_cell_has_a_row(tmp_path: Path, speeds: Speeds) -> None:
    rows, _ = run(experiment(tmp_path))
    assert [(row["ranks"], row["images_per_s"]) for row in rows] == [(1, 100.0), (2, 190.0)]
    assert [row["micro_batch"] for row in rows] == [64, 32]
    assert read_results_file(tmp_path / "test/results.json")["rows"] == rows


def test_a_loss_that_is_not_finite_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    results = Results(experiment(tmp_path))
    row = {"key": "a", "axes": {}, "images_per_s": 1.0, "step_ms": 2.0}
    results.add(row | {"loss": math.nan})
    (back,) = read_results_file(results.path)["rows"]
    assert back == row | {"loss": "nan"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ranks.json", '{"rank_ms": [1.0, "2"]}'),
        ("ranks.json", '{"rank_ms": []}'),
        ("ranks.json", "[" * 3000),
        ("environment.json", '{"packages": []}'),
        ("metrics.jsonl", '{"kind": "../x", "update": 1}'),
        ("metrics.jsonl", ""),
    ],
)
def test_a_result_that_is_none_is_a_row(
    file: str, text: str, tmp_path: Path, speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(command: list[str], *_: object) -> None:
        subprocess.run(command, check=True)
        if len(command) > 4:
            Path(command[3], file).write_text(text)

    monkeypatch.setattr(runner, "_launch", launch)
    rows, _ = run(experiment(tmp_path, [1], link_mib=[]))
    assert "ended without a result" in rows[0]["error"]


def test_links_are_tested_once_before_the_first_cell(tmp_path: Path, speeds: Speeds) -> None:
    run(experiment(tmp_path, link_mib=[1, 2]))
    links = {"rows": [{"bytes": 1.0}, {"bytes": 2.0}]}
    assert read_results_file(tmp_path / "test/results.json")["links"] == links
    (tmp_path / "test/links.json").unlink()
    run(experiment(tmp_path, link_mib=[3]))
    assert read_results_file(tmp_path / "test/results.json")["links"] == links


def test_links_that_fail_are_said_and_tried_again(
    tmp_path: Path, speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(runner, "launcher", lambda *_: ["false"])
        rows, said = run(experiment(tmp_path))
    assert said[0].startswith("links: failed: exit code 1")
    assert [row["images_per_s"] for row in rows] == [100.0, 190.0]
    run(experiment(tmp_path), retry=True)
    assert "rows" in read_results_file(tmp_path / "test/results.json")["links"]


@pytest.mark.parametrize(("ranks", "sizes"), [([1], [1]), ([1, 2], [])])
def test_without_links_or_sizes_none_are_tested(
    ranks: list[int], sizes: list[float], tmp_path: Path, speeds: Speeds
) -> None:
    run(experiment(tmp_path, ranks, link_mib=sizes))
    assert read_results_file(tmp_path / "test/results.json")["links"] == {"rows": []}


def test_goes_on_where_it_stopped(tmp_path: Path, speeds: Speeds) -> None:
    run(experiment(tmp_path, [1]))
    speeds[1] = 0  # would fail
    rows, said = run(experiment(tmp_path))
    assert [row.get("images_per_s") for row in rows] == [100.0, 190.0]
    assert "(known)" in said[0]
    assert "(known)" not in said[1]


def test_a_cell_that_was_killed_is_run_anew(tmp_path: Path, speeds: Speeds) -> None:
    under_way = experiment(tmp_path)
    left = under_way.cells[0].config.folder
    left.mkdir(parents=True)
    (left / "metrics.jsonl").write_text("half a r")
    assert [row.get("images_per_s") for row in run(under_way)[0]] == [100.0, 190.0]


def test_a_cell_that_fails_is_a_row_and_not_the_end(tmp_path: Path, speeds: Speeds) -> None:
    speeds[1] = 0
    rows, said = run(experiment(tmp_path))
    assert "no speed: expected one, got 0" in rows[0]["error"]
    assert rows[1]["images_per_s"] == 190.0
    assert "failed" in said[0]


def test_a_cell_gets_the_gpus_that_its_user_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = experiment(tmp_path, [2])
    monkeypatch.setattr(runner, "device_type", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    started = runner.command(two, two.cells[0], tmp_path)
    assert started[started.index("--include") + 1] == "localhost:4,5"
    assert "--num_accelerators" not in started
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES: expected 2 GPUs, got 4"):
        runner.command(two, two.cells[0], tmp_path)


def test_retry_runs_what_has_failed(tmp_path: Path, speeds: Speeds) -> None:
    speeds[1] = 0
    run(experiment(tmp_path))
    speeds |= {1: 100.0, 2: 0}
    assert "error" in run(experiment(tmp_path))[0][0]
    rows, _ = run(experiment(tmp_path), retry=True)
    assert [row.get("images_per_s") for row in rows] == [100.0, 190.0]


def test_a_cell_is_run_again_when_its_zero_settings_have_changed(
    tmp_path: Path, speeds: Speeds
) -> None:
    def under(settings: str) -> list[float]:
        (tmp_path / "zero.json").write_text(settings)
        axes = {"train.deepspeed": str(tmp_path / "zero.json")}
        planned = load_experiment(write(tmp_path, axes), [f"output={tmp_path}"])
        return [row["images_per_s"] for row in run(planned)[0]]

    assert under('{"zero_optimization": {"stage": 1}}') == [100.0]
    speeds[1] = 120.0
    assert under('{"zero_optimization": {"stage": 1}}') == [100.0]
    assert under('{"zero_optimization": {"stage": 2}}') == [120.0]


def test_a_cell_without_a_result_is_a_row(
    tmp_path: Path, speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "command", lambda *_: ["true"])
    assert "ended without a result" in run(experiment(tmp_path))[0][0]["error"]


def test_a_cell_that_hangs_is_ended(tmp_path: Path, speeds: Speeds) -> None:
    speeds[1] = -1
    rows, _ = run(experiment(tmp_path, timeout=0.5))
    assert "not finished after 0.5 s" in rows[0]["error"]


def test_a_batch_that_ranks_cannot_share_is_a_row(tmp_path: Path, speeds: Speeds) -> None:
    rows, _ = run(experiment(tmp_path, [1, 3]))
    assert "train.global_batch: expected a multiple of" in rows[1]["error"]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path, speeds: Speeds) -> None:
    run(experiment(tmp_path))
    before = (tmp_path / "test/results.json").read_text()
    with pytest.raises(ConfigError) as caught:
        run(experiment(tmp_path, updates=7))
    assert caught.value.where == "scaling.updates"
    assert (tmp_path / "test/results.json").read_text() == before


def test_two_at_once_are_refused(tmp_path: Path, speeds: Speeds) -> None:
    (tmp_path / "test").mkdir()
    with (
        lock(tmp_path / "test"),
        pytest.raises(CheckpointError, match="locked by another running process"),
    ):
        run(experiment(tmp_path))


def test_what_a_killed_one_has_started_is_not_disturbed(tmp_path: Path) -> None:
    """Another may start when it has ended, and not before."""
    script = (
        "import sys; from pathlib import Path; from irpe_ds.benchmark.runner import _launch\n"
        "from irpe_ds.training.start import lock\n"
        "with lock(Path('.')) as held:\n"
        "    waits = 'touch begun; while [ ! -e go ]; do sleep 0.1; done'\n"
        "    _launch(['sh', '-c', waits], Path('output'), 600, held)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    with pytest.raises(CheckpointError, match="locked by another running process"):
        lock(tmp_path)
    (tmp_path / "go").touch()
    end = time.monotonic() + 60
    while True:
        try:
            lock(tmp_path).close()
        except CheckpointError:
            assert time.monotonic() < end
            time.sleep(0.1)
        else:
            break


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": [{}]}', "{"])
def test_another_file_is_no_results(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="results of a scaling experiment"):
        read_results_file(path)


def test_results_are_whole_after_every_row(tmp_path: Path) -> None:
    planned = experiment(tmp_path)
    (tmp_path / "test").mkdir()
    results = Results(planned)
    for speed in (1.0, 2.0):
        results.add({"key": "a", "images_per_s": speed})
        content = json.loads((tmp_path / "test/results.json").read_text())
        assert content["rows"] == [{"key": "a", "images_per_s": speed}]
