"""The log of a run: JSONL and CSV always, Weights & Biases and TensorBoard when configured."""

import csv
import importlib
import io
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO

from irpe_ds.errors import ConfigError
from irpe_ds.files import replace_file

METRICS = "metrics.jsonl"
FINISH_SECONDS = 10  # for the last upload: a preempted run has some 30 to save and to end
QUEUE_ROWS = 10_000  # that a copy may lie behind; some 20 MB

Row = dict[str, Any]


class Sink(Protocol):
    """Where copies of the rows go."""

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class RunLog:
    """Keeps what a run reports in its folder; for rank 0, inactive on every other rank.

    The files are the record: an error in writing them is the run's. W&B and TensorBoard are
    copies, each written by a thread of its own, so that none delays training: the first error of
    one is told on stderr and in log.txt, and that one is switched off; one that hangs loses rows,
    which is told too.

    Args:
        wandb: mode, project, entity and tags, as in `WandbConfig`.
        resume_update: the update that training goes on from. Rows of later updates, which will
            be written again, and a torn last line are dropped. None: a fresh run.
        again: kinds whose rows of that very update will be written again too.

    Raises:
        ConfigError: a fresh run finds metrics of an earlier one, or metrics are not readable.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool = True,
        name: str,
        config: Mapping[str, Any],
        wandb: Mapping[str, Any],
        tensorboard: bool = False,
        resume_update: int | None = None,
        again: Collection[str] = (),
    ) -> None:
        self._copies: list[Copy] = []
        self._files: FileSink | None = None
        self._lock = Lock()  # of the text
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._files = FileSink(folder, resume_update, again)
        self._text = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")

        resumed = resume_update is not None
        if wandb["mode"] != "disabled":
            self._start("W&B", "wandb", lambda: WandbSink(folder, name, config, resumed, **wandb))
        if tensorboard:
            events = folder / "tensorboard"
            module = "torch.utils.tensorboard"
            self._start("TensorBoard", module, lambda: TensorBoardSink(events, resume_update))

    def log(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Write one row of numbers; `kind`, an identifier, names its table: train, eval."""
        if self._files is None:
            return
        values = {key: float(value) for key, value in values.items()}
        self._files.write(kind, update, values)
        for copy in self._copies:
            copy.write(kind, update, values)

    def note(self, text: str) -> None:
        """Write a line to stdout and, with the time, to log.txt."""
        if self._files is not None:
            self._say(text, sys.stdout)

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        if self._files is not None:
            self._files.sync()

    def close(self, failed: bool = False) -> None:
        """Finish every sink; `failed` gives the W&B run exit code 1. Again: nothing.

        Copies that have not finished after FINISH_SECONDS are given up, which is told.
        """
        deadline = time.monotonic() + FINISH_SECONDS
        for copy in self._copies:
            copy.end(failed)
        for copy in self._copies:
            copy.wait(deadline - time.monotonic())
        self._copies.clear()
        if self._files is not None:
            self._files.close()
            with self._lock:
                self._text.close()
            self._files = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def _start(self, label: str, module: str, open_sink: Callable[[], Sink]) -> None:
        """Start a copy. Its module is imported here: loaders fork, and locks of imports stay."""
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises any kind
            self._warn(_switched_off(label, error))
        else:
            self._copies.append(Copy(label, open_sink, self._warn))

    def _warn(self, text: str) -> None:
        self._say(text, sys.stderr)

    def _say(self, text: str, stream: TextIO) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with self._lock:
            if self._text.closed:  # a copy that was given up speaks too late
                return
            self._text.write(f"{now} {text}\n")
            if "tqdm" in sys.modules:  # only then can there be a progress bar to keep whole
                from tqdm import tqdm

                tqdm.write(text, file=stream)
            else:
                print(text, file=stream)
            stream.flush()


class Copy:
    """A sink behind a thread: whatever it does, raises or hangs in, no method but `wait` waits.

    A daemon thread, so that the process can end while the sink hangs.

    Args:
        warn: told when the sink fails, and when rows are lost; called from either thread.
    """

    def __init__(
        self, label: str, open_sink: Callable[[], Sink], warn: Callable[[str], None]
    ) -> None:
        self._label, self._warn = label, warn
        self._queue: SimpleQueue[tuple[str, int, Mapping[str, float]] | bool] = SimpleQueue()
        self._full = False
        self._thread = Thread(target=self._work, args=(open_sink,), name=label, daemon=True)
        self._thread.start()

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Leave a row to the thread; it is lost when QUEUE_ROWS wait already."""
        if self._queue.qsize() < QUEUE_ROWS:
            self._queue.put((kind, update, values))
        elif not self._full and self._thread.is_alive():
            self._full = True
            waiting = f"{QUEUE_ROWS} rows wait, further ones are lost"
            self._warn(f"{self._label} logging hangs: {waiting}")

    def end(self, failed: bool) -> None:
        """Have the sink closed once it has every row."""
        self._queue.put(failed)

    def wait(self, seconds: float) -> None:
        """Return when the sink is closed, or give it up after so long."""
        self._thread.join(max(seconds, 0))
        if self._thread.is_alive():
            text = f"{self._label} logging is given up: not finished within {FINISH_SECONDS} s"
            self._warn(text)

    def _work(self, open_sink: Callable[[], Sink]) -> None:
        try:
            sink = open_sink()
            while not isinstance(item := self._queue.get(), bool):
                sink.write(*item)
            sink.close(failed=item)
        except Exception as error:  # whatever a copy raises, training goes on
            self._warn(_switched_off(self._label, error))


def _switched_off(label: str, error: Exception) -> str:
    return f"{label} logging is switched off: {type(error).__name__}: {error}"


class FileSink:
    """metrics.jsonl, the record, and `{kind}.csv`, the same rows by kind as tables.

    JSON has no NaN or infinity: they are the strings "nan", "inf" and "-inf" there.
    """

    def __init__(
        self, folder: Path, resume_update: int | None, again: Collection[str] = ()
    ) -> None:
        self._folder, self._path = folder, folder / METRICS
        self._columns: dict[str, list[str]] = {}
        if resume_update is not None:
            self._rewind(resume_update, again)
        elif self._path.exists():
            raise ConfigError(
                self._path, "no metrics in the folder of a fresh run", "those of an earlier run"
            )
        self._file = self._path.open("a", buffering=1, encoding="utf-8")

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        if not kind.isidentifier():
            raise ValueError(f"kind: expected an identifier, got {kind!r}")
        row: Row = dict(kind=kind, update=update, **values)
        self._file.write(_to_line(row))
        columns = self._columns.get(kind, [])
        if columns and row.keys() <= {"kind", *columns}:
            with self._table(kind).open("a", buffering=1, newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns, extrasaction="ignore").writerow(row)
        else:
            self._tabulate(kind, read_rows(self._path))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _rewind(self, update: int, again: Collection[str]) -> None:
        rows = read_rows(self._path) if self._path.exists() else []
        kept = [row for row in rows if row["update"] <= update - (row["kind"] in again)]
        for kind in {row["kind"] for row in rows}:
            self._tabulate(kind, kept)
        # The record comes last: a kill before this line leaves it whole, to be rewound again.
        replace_file(self._path, "".join(map(_to_line, kept)))

    def _tabulate(self, kind: str, rows: Sequence[Row]) -> None:
        """Write the table of one kind anew; its columns are those of all its rows."""
        rows = [row for row in rows if row["kind"] == kind]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
        self._columns[kind] = columns
        if not rows:
            self._table(kind).unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self._table(kind), text.getvalue())

    def _table(self, kind: str) -> Path:
        return self._folder / f"{kind}.csv"


class WandbSink:
    """One W&B run, with metrics `{kind}/{name}` over `update`; its id is kept in wandb_id.txt.

    W&B cannot take points back: after a resume it shows those of repeated updates twice.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        resumed: bool,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        tags: Sequence[str],
        group: str | None = None,
    ) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key; run `wandb login` or set log.wandb.mode=offline")
        id_file = folder / "wandb_id.txt"
        if not (resumed and id_file.exists()):
            replace_file(id_file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow",
            reinit="create_new",  # a run that the caller may have open stays the caller's
            name=name,
            config=dict(config),
            allow_val_change=True,
            dir=folder,
            mode=mode,
            project=project,
            entity=entity,
            tags=list(tags),
            group=group,
            settings=wandb.Settings(
                console="off",  # printing would wait for W&B
                finish_timeout=FINISH_SECONDS - 1,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{key}": value for key, value in values.items()}
        self._run.log({"update": update, **named})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TensorBoardSink:
    """Scalars `{kind}/{name}` over the update; readers hide what a resume will write again."""

    def __init__(self, folder: Path, resume_update: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_update is None else resume_update + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{kind}/{key}", value, update)
        self._writer.flush()  # the writer is a thread: only here do its errors come out

    def close(self, failed: bool) -> None:
        self._writer.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without a last line that a kill has torn.

    Raises:
        ConfigError: the file cannot be read, or another line is not a row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(path, "a readable metrics file", error.strerror) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            kind, update = row.pop("kind"), int(row.pop("update"))
            rows.append({"kind": kind, "update": update} | {k: float(row[k]) for k in row})
        except (ValueError, TypeError, AttributeError, KeyError):
            if number < len(lines):
                raise ConfigError(f"{path}:{number}", "a row of metrics", repr(line)) from None
    return rows


def _to_line(row: Row) -> str:
    spelled = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(spelled, allow_nan=False) + "\n"
