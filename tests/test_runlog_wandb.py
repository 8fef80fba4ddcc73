"""W&B never stops or delays training, whether it works, fails or hangs."""

import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from irpe_ds import runlog, sinks
from irpe_ds.errors import ConfigError, ExitCode
from irpe_ds.wandb_run import trial_name
from tests.logs import OFFLINE, open_log, updates, write_updates

ONLINE = {**OFFLINE, "mode": "online"}


def assert_holds(path: Path, content: bytes) -> None:
    """W&B's own process may write the last of a run some moments after `finish`."""
    deadline = time.monotonic() + 300
    while content not in path.read_bytes():
        assert time.monotonic() < deadline, f"{path} lacks {content!r}"
        time.sleep(0.02)


class FakeArtifact:
    """What it was given."""

    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.about = name, type, metadata
        self.files: list[str] = []
        self.aliases: list[str] = []

    def add_file(self, path: str, skip_cache: bool) -> None:
        self.files.append(Path(path).name)


class FakeWandb(ModuleType):
    """A wandb that remembers its one run, and raises or hangs in the named function."""

    Settings = dict
    Image = staticmethod(lambda pixels: ("image", pixels.shape))
    Table = staticmethod(lambda columns, data: ("table", columns, data))

    def __init__(self, raises: str, hangs: str) -> None:
        super().__init__("wandb")
        self.raises, self.hangs, self.released = raises, hangs, threading.Event()
        self.rows: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.ends: list[tuple[str, ...]] = []
        self.artifacts: list[FakeArtifact] = []
        self.Artifact = FakeArtifact
        self.metrics: dict[str, str] = {}
        self.options: dict[str, Any] = {}

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
        self.options = options
        return self

    def define_metric(self, name: str, step_metric: str = "", summary: str = "") -> None:
        self.metrics[name] = summary

    def log(self, row: dict[str, Any]) -> None:
        self.reach("log")
        self.rows.append(row)

    def log_artifact(self, artifact: "FakeArtifact", aliases: list[str]) -> None:
        self.reach("log_artifact")
        artifact.aliases = aliases
        self.artifacts.append(artifact)

    def alert(self, title: str, text: str, level: str) -> None:
        self.ends.append((level, title, text))

    def mark_preempting(self) -> None:
        self.ends.append(("preempting",))

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


def test_disabled_does_not_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # timm imports it where it is
    write_updates(tmp_path, 1)
    assert "wandb" not in sys.modules


def test_wandb_offline_run_is_written_and_resumed_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "FINISH_SECONDS", 300)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/checkpoint.json").write_text("{}")
    about = {"notes": "x", "job_type": "y", "artifacts": "all"}
    for resume in (None, 1):
        with open_log(tmp_path, wandb={**OFFLINE, **about}, resume_update=resume) as log:
            log.log("train", 1 if resume is None else 2, {"loss": 0.25})
            log.send(lambda sink: sink.picture("inputs", 1, np.zeros((6, 5, 3), np.uint8)))
            log.send(lambda sink: sink.table("classes", 1, [{"class": "cat", "recall": None}]))
            log.send(lambda sink: sink.checkpoint(tmp_path / "saved", 1, {"top1": 1.0}, ["best"]))
            log.close(ExitCode.REQUEUE, "by a signal")
        (name,) = (tmp_path / "wandb_id.txt").read_text().split()
    stored = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in stored} == {f"run-{name}.wandb"}
    assert len(stored) == 2
    for path in stored:
        for part in (b"train/loss", b"inputs", b"classes", b"checkpoint-", b"Stopped: run"):
            assert_holds(path, part)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/inputs_*.png"))) == 2
    told = f"W&B is offline: wandb sync {tmp_path}/wandb/offline-run-*"
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [told, told]


def test_fresh_run_has_an_id_of_its_own(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    fake_wandb()
    (tmp_path / "wandb_id.txt").write_text("leftover\n")
    open_log(tmp_path, wandb=OFFLINE).close()
    assert (tmp_path / "wandb_id.txt").read_text().strip() != "leftover"


IN_A_SWEEP = {"WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "a1b2c3d4"}


@pytest.mark.parametrize("kept", [None, "0ld1d"])
def test_a_trial_of_a_sweep_has_the_agents_id(
    kept: str | None, tmp_path: Path, fake_wandb: FakeWandbOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake_wandb()
    for name, value in IN_A_SWEEP.items():
        monkeypatch.setenv(name, value)
    if kept:
        (tmp_path / "wandb_id.txt").write_text(kept)
    open_log(tmp_path, wandb=OFFLINE, resume_update=3 if kept else None).close()
    assert wandb.options["id"] == "a1b2c3d4"
    assert (tmp_path / "wandb_id.txt").read_text() == "a1b2c3d4\n"


def test_trials_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial_name("mine") == "mine"
    for name, value in IN_A_SWEEP.items():
        monkeypatch.setenv(name, value)
    assert trial_name("mine") == "mine-a1b2c3d4"
    assert trial_name("lr-a1b2c3d4") == "lr-a1b2c3d4"
    monkeypatch.setenv("WANDB_RUN_ID", "../../x")
    with pytest.raises(ConfigError, match=r"WANDB_RUN_ID: expected the id of a W&B run"):
        trial_name("mine")


@pytest.mark.parametrize("text", ["../../x", "a b", "", "x" * 2000, "\x1b[2J"])
def test_an_id_that_is_none_is_told(
    text: str, tmp_path: Path, fake_wandb: FakeWandbOf, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = fake_wandb()
    (tmp_path / "wandb_id.txt").write_text(text)
    open_log(tmp_path, wandb=OFFLINE, resume_update=3).close()
    if text:
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith("W&B logging switched off: ")
        assert "wandb_id.txt" in told
        assert told.isprintable()
        assert not wandb.options
    else:  # of a run that was killed just then
        assert re.fullmatch(r"[0-9a-f]{8}", wandb.options["id"])


def test_summaries_keep_the_best(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    wandb = fake_wandb()
    open_log(tmp_path, wandb=OFFLINE).close()
    best = {name: kind for name, kind in wandb.metrics.items() if kind}
    assert best == {
        f"eval/{prefix}{key}": kind
        for prefix in ("", "ema_")
        for key, kind in (("top1", "max"), ("top5", "max"), ("loss", "min"))
    }


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
    assert wandb.ends == [("ERROR", "Failed: run", "KeyboardInterrupt: ")]


def test_a_run_that_ends_well_alerts_nobody(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    wandb = fake_wandb()
    with open_log(tmp_path, wandb=OFFLINE):
        pass
    assert (wandb.exit_code, wandb.ends) == (0, [])


def test_a_stopped_run_is_preempted_and_alerts(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    wandb = fake_wandb()
    with open_log(tmp_path, wandb=OFFLINE, name="x" * 100) as log:
        log.close(ExitCode.REQUEUE, "by a signal after update 7")
    assert wandb.exit_code == 75
    title = "Stopped: " + "x" * 54
    assert wandb.ends == [("preempting",), ("WARN", title, "by a signal after update 7")]


def test_what_w_and_b_is_told_of_a_run(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    wandb = fake_wandb()
    about = {"notes": "with cross", "job_type": "ablation", "tags": ("a",), "group": "seeds"}
    config = {"seed": 3, "environment": {"commit": "abc"}, "deepspeed": {"bf16": {}}}
    open_log(tmp_path, wandb={**OFFLINE, **about}, config=config).close()
    assert wandb.options["config"] == config
    assert {key: wandb.options[key] for key in about} == {**about, "tags": ["a"]}


def test_pictures_and_tables_stand_at_their_update(tmp_path: Path, fake_wandb: FakeWandbOf) -> None:
    wandb = fake_wandb()
    rows = [{"class": "cat", "images": 2}, {"class": "dog", "images": 1}]
    with open_log(tmp_path, wandb=OFFLINE, tensorboard=True) as log:
        assert log.has_sinks
        log.send(lambda sink: sink.picture("inputs", 4, np.zeros((6, 5, 3), np.uint8)))
        log.send(lambda sink: sink.table("classes", 9, rows))
    assert wandb.rows == [
        {"update": 4, "inputs": ("image", (6, 5, 3))},
        {"update": 9, "classes": ("table", ["class", "images"], [["cat", 2], ["dog", 1]])},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("inputs")
    assert (image.step, image.width, image.height) == (4, 5, 6)


@pytest.mark.parametrize("artifacts", ["none", "all"])
def test_only_an_upload_of_checkpoints_may_take_long(
    artifacts: str, tmp_path: Path, fake_wandb: FakeWandbOf
) -> None:
    wandb = fake_wandb()
    open_log(tmp_path, wandb={**OFFLINE, "artifacts": artifacts}).close()
    seconds = {"none": runlog.FINISH_SECONDS, "all": runlog.UPLOAD_SECONDS}[artifacts]
    assert wandb.options["settings"]["finish_timeout"] == seconds - 1


def test_checkpoints_become_versions_and_one_that_is_gone_is_told(
    tmp_path: Path, fake_wandb: FakeWandbOf
) -> None:
    wandb = fake_wandb()
    folder = tmp_path / "update-00000004"
    folder.mkdir()
    for name in ("checkpoint.json", "rank.safetensors"):
        (folder / name).touch()
    with open_log(tmp_path / "run", wandb=OFFLINE) as log:
        for path in (tmp_path / "removed", folder):
            log.send(lambda sink, path=path: sink.checkpoint(path, 4, {"top1": 9.0}, ["best"]))
    (sent,) = wandb.artifacts
    assert sent.about == (
        f"checkpoint-{wandb.options['id']}",
        "model",
        {"run": "run", "update": 4, "top1": 9.0},
    )
    assert sent.files == ["checkpoint.json", "rank.safetensors"]
    assert sent.aliases == ["latest", "best"]
    assert wandb.exit_code == 0
    text = (tmp_path / "run/log.txt").read_text()
    assert f"{tmp_path}/removed was not sent to W&B: " in text


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
    monkeypatch.setattr(sinks, "QUEUE_ROWS", 10)
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
    thread.join(300)
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
        timeout=900,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("W&B logging abandoned: not finished within 0.5 s\n")
