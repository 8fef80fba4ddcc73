"""The log of a run: its files survive kills and resumes."""

import csv
import json
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any, TextIO

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from irpe_ds import runlog
from irpe_ds.errors import CheckpointError, ConfigError, UserError
from irpe_ds.files import open_own
from irpe_ds.runlog import read_rows
from irpe_ds.sinks import TensorBoardSink
from tests.logs import OFFLINE, open_log, updates, write_updates


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


@pytest.mark.parametrize(
    "row",
    [
        '{"kind": "HERE/mine", "update": 99}',
        '{"kind": "../mine", "update": 99}',
        '{"kind": "sub/../../mine", "update": 1}',
        '{"kind": "", "update": 1}',
        '{"kind": "%s", "update": 1}' % ("x" * 300),
        '{"kind": "a\\u0000", "update": 1}',
        '{"kind": 5, "update": 1}',
        '{"kind": null, "update": 1}',
        '{"kind": "train"}',
        '{"kind": "train", "update": "1"}',
        '{"kind": "train", "update": true}',
        '{"kind": "train", "update": 1.5}',
        '{"kind": "train", "update": -1}',
        '{"kind": "train", "update": 1%s}' % ("0" * 400),
        '{"kind": "train", "update": 1, "update": 2}',
        '{"kind": "train", "update": 1, "loss": "1.5"}',
        '{"kind": "train", "update": 1, "loss": true}',
        '{"kind": "train", "update": 1, "loss": [1]}',
        '{"kind": "train", "update": 1, "loss": NaN}',
        '{"kind": "train", "update": 1, "loss": 1%s}' % ("0" * 400),
        '{"kind": "train", "update": 1, "=cmd|x": 1}',
        '{"kind": "train", "update": 1, "loss": %s}' % ("[" * 2000 + "]" * 2000),
        "[]",
        "null",
        "\\xff",
        "",
    ],
)
@pytest.mark.parametrize("end", ["\n", '\n{"kind": "train", "update": 3}\n'])
def test_what_is_no_row_is_an_error_and_touches_no_file(row: str, end: str, tmp_path: Path) -> None:
    mine, run = tmp_path / "mine.csv", tmp_path / "run"
    mine.write_text("precious")
    write_updates(run, 2)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row.replace("HERE", str(tmp_path)) + end)
    with pytest.raises(ConfigError, match=r"run/metrics\.jsonl:4: expected a row of metrics") as e:
        open_log(run, resume_update=2)
    assert str(e.value).isprintable()
    assert mine.read_text() == "precious"
    for name in ("train.csv", "eval.csv"):
        assert (run / name).read_bytes() == before[name]


def test_a_bad_row_without_a_line_break_is_not_taken_for_an_incomplete_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "../mine", "update": 99}')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: expected a row"):
        open_log(tmp_path, resume_update=2)


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "train.csv", ".train.csv.partial"])
@pytest.mark.parametrize("resume", [None, 1])
def test_a_link_in_the_run_folder_is_not_followed(
    name: str, resume: int | None, tmp_path: Path
) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    text = '{"kind": "train", "update": 1}\n'
    mine.write_text(text)
    run.mkdir()
    if resume and name != "metrics.jsonl":
        (run / "metrics.jsonl").write_text(text)
    (run / name).symlink_to(mine)
    message = f"a symbolic link in place of a file|{run}/metrics.jsonl: a fresh run would overwrite"

    def write() -> None:
        with open_log(run, resume_update=resume) as log:
            log.log("train", 2, {})
            log.note("x")

    if name.startswith("."):
        write()
    else:
        with pytest.raises(UserError, match=message):
            write()
    assert mine.read_text() == text
    assert (run / name).is_symlink() != name.startswith(".")


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.csv", "log.txt", "skipped.jsonl"])
def test_a_full_disk_is_one_line_whatever_w_and_b_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(TensorBoardSink):
        def write(self, *_: object) -> None:
            raise ConnectionError("no network")

    def open_full(path: Path) -> TextIO:
        return open("/dev/full", "a", buffering=1) if path.name == name else open_own(path)

    monkeypatch.setattr(runlog, "TensorBoardSink", Broken)
    monkeypatch.setattr(runlog, "open_own", open_full)
    message = f"^cannot write {tmp_path}/{name}: No space left on device$"

    def write() -> None:
        with open_log(tmp_path, tensorboard=True) as log:
            log.log("train", 1, {"loss": 1.0})
            log.log("train", 2, {"loss": 1.0})
            log.append("skipped.jsonl", "{}")
            log.note("x")

    with pytest.raises(CheckpointError, match=message):
        write()
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    log = open_log(tmp_path / "run")
    log.log("train", 1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    for write in (lambda: log.log("train", 2, {"loss": 1.0}), log.sync):
        with pytest.raises(CheckpointError, match=r"^cannot write .*/run/.*: No such file or"):
            write()
    log.close()


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
