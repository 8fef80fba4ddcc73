"""Tasks divided up by processes: a claim holds while its process works, and no longer."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from irpe_ds.data.beton import claims
from irpe_ds.data.beton.claims import DONE, Claims, Task
from irpe_ds.errors import DataError


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Claims]]:
    """Two on hosts of their own: neither knows the other's process numbers."""
    made = []
    for host in ("node1", "node2"):
        monkeypatch.setattr(claims, "_machine", lambda host=host: host)
        made.append(Claims(tmp_path))
    with made[0], made[1]:
        yield made


def tasks_of(folder: Path, count: int, done: list[str]) -> list[Task]:
    def do(name: str) -> None:
        done.append(name)
        (folder / (name + DONE)).touch()

    return [Task(str(n), lambda n=n: do(str(n))) for n in range(count)]  # type: ignore[misc]


def never() -> bool:
    return False


def pretend(path: Path, **values: object) -> None:
    """Change what a claim says of its process."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_each_task_is_done_once(tmp_path: Path, processes: list[Claims]) -> None:
    done: list[str] = []
    tasks = tasks_of(tmp_path, 5, done)
    assert processes[0]._claim(tasks) == tasks[0]
    processes[1].share(tasks[1:], never)
    assert done == ["1", "2", "3", "4"]
    processes[0].share(tasks[1:], never)
    assert done == ["1", "2", "3", "4"]


def test_claim_of_a_live_process_holds_and_a_silent_one_loses_it(
    tmp_path: Path, processes: list[Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("irpe_ds.data.beton.claims.time.monotonic", lambda: now[0])
    (task,) = tasks_of(tmp_path, 1, [])
    assert processes[0]._claim([task]) == task
    path = processes[0]._path(task)
    for beat in range(1, 4):
        now[0] += 0.9 * claims.STALE_SECONDS
        os.utime(path, ns=(0, beat))  # a clock of long ago: only the change counts
        assert processes[1]._claim([task]) is None
    now[0] += 0.9 * claims.STALE_SECONDS
    assert processes[1]._claim([task]) is None
    now[0] += 0.2 * claims.STALE_SECONDS
    assert processes[1]._claim([task]) == task
    assert json.loads(path.read_text())["machine"] == "node2"
    assert processes[0]._claim([task]) is None


def test_claim_of_a_dead_process_is_taken_over_at_once_on_its_machine_only(
    tmp_path: Path, processes: list[Claims]
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])  # a zombie until it is waited for
    while claims._start_time(dead.pid) is not None:
        time.sleep(0.01)
    (task,) = tasks_of(tmp_path, 1, [])
    assert processes[0]._claim([task]) == task
    path = processes[0]._path(task)
    left = tmp_path / "node1.1.00000000"
    left.mkdir()
    pretend(path, pid=dead.pid, name=left.name)
    assert processes[1]._claim([task]) is None
    assert left.exists()
    assert processes[0]._claim([task]) == task
    assert not left.exists()
    dead.wait()
    pretend(path, started="1")  # this process's number, of another process before it
    assert processes[0]._claim([task]) == task


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "../.."}'])
def test_claim_that_says_nothing_goes_stale(
    tmp_path: Path, processes: list[Claims], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = tasks_of(tmp_path, 1, [])
    processes[0]._path(task).write_text(text)
    assert processes[1]._claim([task]) is None
    monkeypatch.setattr(claims, "STALE_SECONDS", 0)
    assert processes[1]._claim([task]) == task


def test_name_that_leads_elsewhere_is_not_followed(tmp_path: Path, processes: list[Claims]) -> None:
    (task,) = tasks_of(tmp_path, 1, [])
    assert processes[0]._claim([task]) == task
    outside = tmp_path / "outside.1.00000000"
    outside.mkdir()
    pretend(processes[0]._path(task), pid=1 << 22, name="x/../outside.1.00000000")
    assert processes[0]._claim([task]) is None
    assert outside.exists()


def test_a_newer_claim_is_given_back(
    tmp_path: Path, processes: list[Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the same dead claim; the second is late."""
    (task,) = tasks_of(tmp_path, 1, [])
    assert processes[0]._claim([task]) == task
    path = processes[0]._path(task)
    pretend(path, started="1")

    def is_dead(owner: object) -> bool:
        path.write_text("of the first")
        return True

    monkeypatch.setattr(processes[1], "_is_dead", is_dead)
    assert processes[1]._claim([task]) is None
    assert path.read_text() == "of the first"


def test_error_of_what_another_process_has_done_meanwhile_is_none(
    tmp_path: Path, processes: list[Claims]
) -> None:
    def fails(is_done: bool) -> None:
        if is_done:
            (tmp_path / ("0" + DONE)).touch()
        raise DataError("--source", "an image", "none")

    processes[0].share([Task("0", lambda: fails(True))], never)
    with pytest.raises(DataError, match="an image"):
        processes[0].share([Task("1", lambda: fails(False))], never)
    assert processes[1]._claim([Task("1", lambda: None)])  # at once


def test_waits_for_the_others_and_says_for_whom(
    tmp_path: Path,
    processes: list[Claims],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (task,) = tasks_of(tmp_path, 1, [])
    assert processes[0]._claim([task]) == task
    monkeypatch.setattr(
        "irpe_ds.data.beton.claims.time.sleep", lambda _: (tmp_path / ("0" + DONE)).touch()
    )
    processes[1].share([task], never)
    said = capsys.readouterr().err
    assert f"waiting for other processes: 0 by {processes[0]._me.host} (process " in said


def test_claims_are_touched_while_their_task_is_done(
    tmp_path: Path, processes: list[Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    path = processes[0]._path(Task("0", never))  # type: ignore[arg-type]

    def do() -> None:
        os.utime(path, ns=(0, 0))
        while path.stat().st_mtime_ns == 0:
            time.sleep(0.01)
        (tmp_path / ("0" + DONE)).touch()

    with Claims(tmp_path) as beating:
        beating.share([Task("0", do)], never)


def test_folder_that_is_removed_ends_the_wait(tmp_path: Path, processes: list[Claims]) -> None:
    (task,) = tasks_of(tmp_path, 1, [])
    assert processes[0]._claim([task]) == task
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        processes[1].share([task], never)
