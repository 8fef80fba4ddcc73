"""The log of a run: its files survive kills and resumes, background sinks never stop training."""

import csv
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from irpe_ds import runlog
from irpe_ds.config import WandbConfig
from irpe_ds.errors import ConfigError
from irpe_ds.runlog import RunLog, TensorBoardSink, read_rows

DISABLED = WandbConfig().model_dump()
OFFLINE = WandbConfig(mode="offline", tags=("test",)).model_dump()
ONLINE = {**OFFLINE, "mode": "online"}


def open_log(folder: Path, **options: Any) -> RunLog:
    return RunLog(folder, **{"name": "run", "config": {"seed": 0}, "wandb": DISABLED, **options})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_updates(folder: Path, last: int) -> None:
    """Training rows of updates 1 to last, evaluation rows of the even ones."""
    with open_log(folder) as log:
        for update in range(1, last + 1):
            log.log("train", update, {"loss": 1 / update})
            if update % 2 == 0:
                log.log("eval", update, {"top1": 10.0 * update})


def updates(folder: Path, kind: str) -> list[int]:
    return [row["update"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def assert_holds(path: Path, content: bytes) -> None:
    """W&B's own process may write the last of a run some moments after `finish`."""
    deadline = time.monotonic() + 20
    while content not in path.read_bytes():
        assert time.monotonic() < deadline, f"{path} lacks {content!r}"
        time.sleep(0.02)


class FakeWandb(ModuleType):
    """A wandb that remembers its one run, and raises or hangs in the named function."""

    Settings = dict

    def __init__(self, raises: str, hangs: str) -> None:
        super().__init__("wandb")
        self.raises, self.hangs, self.released = raises, hangs, threading.Event()
        self.rows: list[dict[str, float]] = []
        self.exit_code: int | None = None

    def reach(self, function: str) -> None:
        if self.raises == function:
            raise ConnectionError("no network")
        if self.hangs == function:
            self.released.wait()

    def login(self, prompt: bool) -> bool:
        self.reach("login")
        return not prompt and self.raises != "key"

    def init(self, **options: Any) -> "FakeWandb":
        self.reach("init")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def log(self, row: dict[str, float]) -> None:
        self.reach("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.reach("finish")
        self.exit_code = exit_code


FakeWandbOf = Callable[..., FakeWandb]


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandbOf]:
    """Puts a FakeWandb in the place of wandb; what hangs in it goes on after the test."""
    made = []

    def install(raises: str = "", hangs: str = "") -> FakeWandb:
        made.append(FakeWandb(raises, hangs))
        monkeypatch.setitem(sys.modules, "wandb", made[-1])
        return made[-1]

    yield install
    for module in made:
        module.released.set()


def test_rows_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    log = open_log(tmp_path / "run")
    log.log("train", 7, {"loss": 0.1 + 0.2, "lr": 1e-7})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "update": 7, "loss": 0.1 + 0.2, "lr": 1e-7}
    ]
    assert table(tmp_path / "run/train.csv") == [
        {"update": "7", "loss": repr(0.1 + 0.2), "lr": "1e-07"}
    ]
    log.close()
    log.close()


def test_csv_has_the_union_of_the_columns(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log("train", 1, {"loss": 3.0})
        log.log("eval", 1, {"top1": 5.0})
        log.log("train", 2, {"loss_scale": 8.0, "loss": 2.0})
        log.log("train", 3, {"loss": 1.0})
    assert table(tmp_path / "train.csv") == [
        {"update": "1", "loss": "3.0", "loss_scale": ""},
        {"update": "2", "loss": "2.0", "loss_scale": "8.0"},
        {"update": "3", "loss": "1.0", "loss_scale": ""},
    ]
    assert table(tmp_path / "eval.csv") == [{"update": "1", "top1": "5.0"}]


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with open_log(tmp_path) as log:
        log.log("train", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["a"], row["b"], row["c"]) == ("nan", "inf", "-inf")
    assert table(tmp_path / "train.csv")[0] == {"update": "1", "a": "nan", "b": "inf", "c": "-inf"}
    (back,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(back["a"])
    assert (back["b"], back["c"]) == (math.inf, -math.inf)


def test_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    write_updates(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "update": 6, "lo')
    with open_log(tmp_path, resume_update=3) as log:
        assert updates(tmp_path, "train") == [1, 2, 3]
        assert updates(tmp_path, "eval") == [2]
        assert [row["update"] for row in table(tmp_path / "train.csv")] == ["1", "2", "3"]
        assert table(tmp_path / "eval.csv") == [{"update": "2", "top1": "20.0"}]
        log.log("train", 4, {"loss": 0.5})
        log.log("eval", 4, {"top1": 41.0})
    assert updates(tmp_path, "train") == [1, 2, 3, 4]
    assert table(tmp_path / "train.csv")[-1] == {"update": "4", "loss": "0.5"}
    assert table(tmp_path / "eval.csv")[-1] == {"update": "4", "top1": "41.0"}
    assert not list(tmp_path.glob(".*"))


def test_resume_before_the_first_evaluation_leaves_no_table_of_it(tmp_path: Path) -> None:
    write_updates(tmp_path, 3)
    open_log(tmp_path, resume_update=1).close()
    assert updates(tmp_path, "train") == [1]
    assert not (tmp_path / "eval.csv").exists()


def test_torn_last_line_alone_and_resume_without_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind"')
    open_log(tmp_path, resume_update=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    write = open_log(tmp_path / "new", resume_update=4)
    write.log("train", 5, {"loss": 1.0})
    write.close()
    assert updates(tmp_path / "new", "train") == [5]


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr\n{"kind": "train", "update": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: expected a row"):
        open_log(tmp_path, resume_update=2)


def test_fresh_run_refuses_the_metrics_of_another(tmp_path: Path) -> None:
    write_updates(tmp_path, 1)
    with pytest.raises(ConfigError, match="fresh run would overwrite"):
        open_log(tmp_path)
    assert updates(tmp_path, "train") == [1]


@pytest.mark.parametrize("kind", ["../train", "", "a b"])
def test_kind_must_be_an_identifier(tmp_path: Path, kind: str) -> None:
    with open_log(tmp_path) as log, pytest.raises(ValueError, match="identifier"):
        log.log(kind, 1, {"loss": 1.0})


def test_inactive_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"wandb": OFFLINE, "tensorboard": True, "resume_update": 3}
    with open_log(tmp_path / "run", active=False, **options) as log:
        log.log("train", 1, {"loss": 1.0})
        log.note("hello")
        log.sync()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_note_goes_to_stdout_and_with_the_time_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as log:
        log.note("epoch 1 begins")
    assert capsys.readouterr().out == "epoch 1 begins\n"
    assert (tmp_path / "log.txt").read_text()[10:].endswith("epoch 1 begins\n")


def test_disabled_does_not_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # timm imports it where it is
    write_updates(tmp_path, 1)
    assert "wandb" not in sys.modules


def test_wandb_offline_run_is_written_and_resumed_under_its_id(tmp_path: Path) -> None:
    for resume in (None, 1):
        with open_log(tmp_path, wandb=OFFLINE, resume_update=resume) as log:
            log.log("train", 1 if resume is None else 2, {"loss": 0.25})
        (name,) = (tmp_path / "wandb_id.txt").read_text().split()
    stored = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in stored} == {f"run-{name}.wandb"}
    assert len(stored) == 2
    for path in stored:
        assert_holds(path, b"train/loss")
    assert not (tmp_path / "log.txt").read_text()


def test_fresh_run_has_an_id_of_its_own(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    fake_wandb()
    (tmp_path / "wandb_id.txt").write_text("leftover\n")
    open_log(tmp_path, wandb=OFFLINE).close()
    assert (tmp_path / "wandb_id.txt").read_text().strip() != "leftover"


def test_wandb_gets_named_rows_in_order_and_the_exit_code(
    tmp_path: Path, fake_wandb: FakeWandbOf
) -> None:
    wandb = fake_wandb()
    log = open_log(tmp_path, wandb=OFFLINE)
    for update in range(1, 501):
        log.log("eval", update, {"top1": update / 10})
    with pytest.raises(KeyboardInterrupt), log:
        raise KeyboardInterrupt
    assert wandb.rows == [{"update": u, "eval/top1": u / 10} for u in range(1, 501)]
    assert wandb.exit_code == 1


@pytest.mark.parametrize("raises", ["import", "login", "key", "init", "log", "finish"])
def test_wandb_that_fails_is_told_once_and_switched_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_wandb: FakeWandbOf,
    capsys: pytest.CaptureFixture[str],
    raises: str,
) -> None:
    fake_wandb(raises)
    if raises == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    with open_log(tmp_path, wandb=ONLINE) as log:
        for update in (1, 2, 3):
            log.log("train", update, {"loss": 1.0})
    assert updates(tmp_path, "train") == [1, 2, 3]
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("W&B logging switched off: ")
    assert told in (tmp_path / "log.txt").read_text()
    reasons = {"import": "wandb", "key": "wandb login"}
    assert reasons.get(raises, "ConnectionError: no network") in told


@pytest.mark.parametrize("hangs", ["login", "init", "log", "finish"])
def test_wandb_that_hangs_delays_no_row_and_the_end_by_a_bound(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_wandb: FakeWandbOf,
    capsys: pytest.CaptureFixture[str],
    hangs: str,
) -> None:
    monkeypatch.setattr(runlog, "FINISH_SECONDS", 0.5)
    wandb = fake_wandb(hangs=hangs)
    log = open_log(tmp_path, wandb=ONLINE)
    start = time.monotonic()
    for update in range(1, 101):
        log.log("train", update, {"loss": 1.0})
    log.close()
    assert time.monotonic() - start < 25  # half of what 100 rows would take that wait
    assert updates(tmp_path, "train") == list(range(1, 101))
    told = "W&B logging abandoned: not finished within 0.5 s"
    assert capsys.readouterr().err.splitlines() == [told]
    assert told in (tmp_path / "log.txt").read_text()
    assert wandb.exit_code is None


def test_wandb_that_lies_too_far_behind_loses_rows_and_that_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_wandb: FakeWandbOf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runlog, "QUEUE_ROWS", 10)
    wandb = fake_wandb(hangs="init")
    with open_log(tmp_path, wandb=OFFLINE) as log:
        for update in range(1, 31):
            log.log("train", update, {"loss": 1.0})
        wandb.released.set()
    assert updates(tmp_path, "train") == list(range(1, 31))
    assert [row["update"] for row in wandb.rows] == list(range(1, 11))
    assert capsys.readouterr().err.splitlines() == [
        "W&B logging hangs: 10 rows are queued, further ones are lost"
    ]


def test_what_a_sink_reports_after_it_was_abandoned_is_dropped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_wandb: FakeWandbOf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runlog, "FINISH_SECONDS", 0.1)
    wandb = fake_wandb(hangs="init")
    with open_log(tmp_path, wandb=OFFLINE):
        pass
    wandb.define_metric = None  # type: ignore[assignment] # so that the thread raises
    wandb.released.set()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "W&B")
    thread.join(10)
    assert not thread.is_alive()
    assert "switched off" not in capsys.readouterr().err


def test_a_process_ends_while_wandb_hangs(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(
        "import time\nSettings = dict\ninit = lambda **_: time.sleep(600)\n"
    )
    code = f"""
        from pathlib import Path
        from irpe_ds import runlog
        runlog.FINISH_SECONDS = 0.5
        wandb = {OFFLINE!r}
        with runlog.RunLog(Path("run"), name="run", config={{}}, wandb=wandb) as log:
            log.log("train", 1, {{"loss": 1.0}})
        """
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("W&B logging abandoned: not finished within 0.5 s\n")


def test_notes_of_several_threads_stay_whole(tmp_path: Path) -> None:
    text = "x" * 5000
    with open_log(tmp_path) as log:
        notes = [lambda: [log.note(text) for _ in range(50)] for _ in range(4)]
        threads = [threading.Thread(target=note) for note in notes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [text] * 200


def test_sync_returns_when_the_rows_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with open_log(tmp_path) as log:
        log.log("train", 1, {"loss": 1.0})
        synced.clear()
        log.sync()
    assert synced == [("metrics.jsonl", (tmp_path / "metrics.jsonl").read_text())]


def test_tensorboard_events_and_what_a_resume_hides(tmp_path: Path) -> None:
    with open_log(tmp_path, tensorboard=True) as log:
        for update in (1, 2, 3):
            log.log("train", update, {"loss": float(update)})
    with open_log(tmp_path, tensorboard=True, resume_update=1) as log:
        log.log("train", 2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = []

    class FullSink(TensorBoardSink):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            writers.append(self._writer.file_writer.event_writer._async_writer)
            writers[0]._writer._writer = full

    monkeypatch.setattr(runlog, "TensorBoardSink", FullSink)
    with Path("/dev/full").open("wb", buffering=0) as full:
        with open_log(tmp_path, tensorboard=True) as log:
            for update in (1, 2, 3):
                log.log("train", update, {"loss": 1.0})
        writers[0]._worker.join()
    assert updates(tmp_path, "train") == [1, 2, 3]
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "switched off" in line]
    assert told.startswith("TensorBoard logging switched off: OSError")
