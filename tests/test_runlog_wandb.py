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

import pytest

from irpe_ds import runlog
from irpe_ds.errors import ConfigError
from irpe_ds.wandb_run import trial_name
from tests.logs import OFFLINE, open_log, updates, write_updates

ONLINE = {**OFFLINE, "mode": "online"}


def assert_holds(path: Path, content: bytes) -> None:
    """W&B's own process may write the last of a run some moments after `finish`."""
    deadline = time.monotonic() + 300
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


def test_disabled_does_not_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # timm imports it where it is
    write_updates(tmp_path, 1)
    assert "wandb" not in sys.modules


def test_wandb_offline_run_is_written_and_resumed_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "FINISH_SECONDS", 300)
    for resume in (None, 1):
        with open_log(tmp_path, wandb=OFFLINE, resume_update=resume) as log:
            log.log("train", 1 if resume is None else 2, {"loss": 0.25})
        (name,) = (tmp_path / "wandb_id.txt").read_text().split()
    stored = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in stored} == {f"run-{name}.wandb"}
    assert len(stored) == 2
    for path in stored:
        assert_holds(path, b"train/loss")
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
