"""The log of a run: JSONL and CSV always, Weights & Biases and TensorBoard when configured."""

import contextlib
import csv
import errno
import importlib
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, TextIO

from irpe_ds.errors import CheckpointError, ConfigError, ExitCode, UserError, printable
from irpe_ds.files import fsync, open_own, read_regular, replace_file
from irpe_ds.schema import parse_json
from irpe_ds.sinks import BackgroundSink, Sink, TensorBoardSink, switched_off
from irpe_ds.wandb_run import WandbSink

METRICS, MESSAGES = "metrics.jsonl", "log.txt"
METRICS_LIMIT = 256 << 20
"""Largest metrics.jsonl that is read: half a million rows."""
ROW_LIMIT = 1 << 16
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""What kinds and columns are called: they become names of files, and of columns of tables."""
FINISH_SECONDS = 10  # for the last upload: a preempted run has about 30 to save and exit
UPLOAD_SECONDS = 900  # for that of checkpoints, by a run that has reached its end

NOT_FINITE = ("nan", "inf", "-inf")
"""How JSON spells them here."""
MetricRow = dict[str, Any]
"""One line of metrics.jsonl: `kind`, `update` and numbers by name."""


class RunLog:
    """Writes a run's metrics and messages to its folder; active on rank 0 only.

    The files are the record: an error in writing them ends the run, and a link in the place of one
    is not followed. W&B and TensorBoard are written by background threads, so that they never delay
    training: the first error of one is reported on stderr and in log.txt and switches it off; one
    that hangs loses rows, which is reported too.

    Args:
        wandb: mode, project and so on, as in `WandbConfig`.
        resume_update: the update that training continues from. Rows of later updates, which will
            be written again, and an incomplete last line are removed. None: a fresh run.
        repeated_kinds: kinds whose rows of that same update will be written again too.

    Raises:
        ConfigError: a fresh run finds metrics of an earlier one, or metrics are not readable.
        CheckpointError: a file cannot be written; so for every method.
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
        repeated_kinds: Collection[str] = (),
    ) -> None:
        self._background: list[BackgroundSink] = []
        self._finish_seconds: float = FINISH_SECONDS
        self._files: FileSink | None = None
        self._lock = Lock()  # guards log.txt
        if not active:
            return
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / MESSAGES):
            self._text = open_own(folder / MESSAGES)
        self._files = FileSink(folder, resume_update, repeated_kinds)
        resumed = resume_update is not None
        if wandb["mode"] != "disabled":
            if wandb["artifacts"] != "none":
                self._finish_seconds = max(UPLOAD_SECONDS, FINISH_SECONDS)
            about = folder, name, config, resumed, self.note, self._finish_seconds - 1
            self._start("W&B", "wandb", lambda: WandbSink(*about, **wandb))
        if tensorboard:
            events = folder / "tensorboard"
            module = "torch.utils.tensorboard"
            self._start("TensorBoard", module, lambda: TensorBoardSink(events, resume_update))

    def log(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Write one row of numbers to the table `kind`, an identifier such as train or eval."""
        if self._files is None:
            return
        values = {key: float(value) for key, value in values.items()}
        self._files.write(kind, update, values)
        self.send(lambda sink: sink.write(kind, update, values))

    @property
    def has_sinks(self) -> bool:
        """Whether rows go to W&B or TensorBoard, on this rank."""
        return bool(self._background)

    def send(self, job: Callable[[Sink], None]) -> None:
        """Call a method of W&B and TensorBoard in their threads, after what was sent before."""
        for sink in self._background:
            sink.put(job)

    def note(self, text: str) -> None:
        """Write a line to stdout and, with a time stamp, to log.txt."""
        if self._files is not None:
            self._print(text, sys.stdout)

    def append(self, name: str, line: str) -> None:
        """Add a line to another file of the run folder."""
        if self._files is not None:
            with writing(self._folder / name), open_own(self._folder / name) as file:
                file.write(line + "\n")

    def sync(self) -> None:
        """Wait until the rows are on disk."""
        if self._files is not None:
            self._files.sync()

    def close(self, exit_code: ExitCode = ExitCode.DONE, reason: str = "") -> None:
        """Finish every sink; W&B is told how the run ended, and why if that was not its end.

        Background sinks that have not finished after FINISH_SECONDS, or UPLOAD_SECONDS if they
        upload checkpoints, are abandoned with a warning. A second call does nothing.
        """
        seconds = FINISH_SECONDS if exit_code else self._finish_seconds
        deadline = time.monotonic() + seconds
        for sink in self._background:
            sink.end(exit_code, reason)
        for sink in self._background:
            if not sink.wait(deadline - time.monotonic()):
                self._warn(f"{sink.label} logging abandoned: not finished within {seconds:g} s")
        self._background.clear()
        if self._files is not None:
            self._files.close()
            with self._lock:
                _close(self._text)
            self._files = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.close(ExitCode.FAILED, f"{type(error).__name__}: {error}")

    def _start(self, label: str, module: str, open_sink: Callable[[], Sink]) -> None:
        """Start a background sink. Its module is imported here, not in the sink's thread: a loader
        that forks during an import would inherit a held import lock."""
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises any kind
            self._warn(switched_off(label, error))
        else:
            self._background.append(BackgroundSink(label, open_sink, self._warn))

    def _warn(self, text: str) -> None:
        """Say what is wrong with a sink: if log.txt cannot be written, the next row says that."""
        with contextlib.suppress(CheckpointError):
            self._print(text, sys.stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        text, now = printable(text), datetime.now().astimezone().isoformat(timespec="seconds")
        with self._lock:
            if self._text.closed:  # a sink that was abandoned speaks too late
                return
            try:
                with writing(self._folder / MESSAGES):
                    self._text.write(f"{now} {text}\n")
            finally:
                with writing(getattr(stream, "name", "the output")):
                    _show(text, stream)


def _show(text: str, stream: TextIO) -> None:
    if "tqdm" in sys.modules:  # only then can there be a progress bar to write around
        from tqdm import tqdm

        tqdm.write(text, file=stream)
    else:
        print(text, file=stream)
    stream.flush()


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises CheckpointError for an error of the disk."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


def _close(file: TextIO) -> None:
    """Close a file whose every line was flushed; what could not be has been reported."""
    with contextlib.suppress(OSError):
        file.close()


class FileSink:
    """metrics.jsonl, the record, and `{kind}.csv`, the same rows as one table per kind.

    JSON has no NaN or infinity: they are written as the strings "nan", "inf" and "-inf".
    """

    def __init__(
        self, folder: Path, resume_update: int | None, repeated_kinds: Collection[str] = ()
    ) -> None:
        self._folder, self._path = folder, folder / METRICS
        self._columns: dict[str, list[str]] = {}
        if resume_update is not None:
            self._rewind(resume_update, repeated_kinds)
        elif self._path.exists():
            raise ConfigError(f"{self._path}: a fresh run would overwrite an earlier run's metrics")
        with writing(self._path):
            self._file = open_own(self._path)

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        row: MetricRow = dict(kind=kind, update=update, **values)
        if not all(NAME.fullmatch(name) for name in (kind, *row)):
            raise ValueError(f"kind and keys: expected identifiers, got {kind!r}, {[*values]}")
        with writing(self._path):
            self._file.write(_to_line(row))
        columns = self._columns.get(kind, [])
        if columns and row.keys() <= {"kind", *columns}:
            path = self._table_path(kind)
            with writing(path), open_own(path) as file:
                csv.DictWriter(file, columns, extrasaction="ignore").writerow(row)
        else:
            self._rewrite_table(kind, read_rows(self._path))

    def sync(self) -> None:
        with writing(self._path):
            fsync(self._path)

    def close(self) -> None:
        _close(self._file)

    def _rewind(self, update: int, repeated_kinds: Collection[str]) -> None:
        _refuse_link(self._path)
        rows = read_rows(self._path) if self._path.exists() else []
        kept = [row for row in rows if row["update"] <= update - (row["kind"] in repeated_kinds)]
        for kind in {row["kind"] for row in rows}:
            self._rewrite_table(kind, kept)
        # The record last: after a kill before this line it is complete, and is rewound again.
        with writing(self._path):
            replace_file(self._path, "".join(map(_to_line, kept)))

    def _rewrite_table(self, kind: str, rows: Sequence[MetricRow]) -> None:
        """Rewrite the table of one kind; its columns are those of all its rows."""
        rows = [row for row in rows if row["kind"] == kind]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
        self._columns[kind], path = columns, self._table_path(kind)
        _refuse_link(path)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        with writing(path):
            if rows:
                replace_file(path, text.getvalue())
            else:
                path.unlink(missing_ok=True)

    def _table_path(self, kind: str) -> Path:
        return self._folder / f"{kind}.csv"


def _refuse_link(path: Path) -> None:
    """Raise CheckpointError for a link, which would be replaced or removed."""
    with writing(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link in place of a file")


def read_rows(path: Path) -> list[MetricRow]:
    """The rows of a metrics.jsonl, without a last line left incomplete by a kill.

    Raises:
        ConfigError: the file cannot be read, or another line is not a row.
    """
    try:
        data = read_regular(path, METRICS_LIMIT)
    except OSError as error:
        raise ConfigError(path, "a readable metrics file", error.strerror) from None
    return [
        _parse_row(line, f"{path}:{number}")
        for number, line in enumerate(io.BytesIO(data), start=1)
        if line.endswith((b"}", b"\n"))  # else it is incomplete, and the last
    ]


def _parse_row(line: bytes, where: str) -> MetricRow:
    """A line as `_to_line` writes it; raises ConfigError."""
    try:
        row = parse_json(line[:ROW_LIMIT], dict[str, Any], where, ConfigError)
        kind, update = row.pop("kind"), row.pop("update")
        names = [kind, *row]
        if type(update) is int and 0 <= update < 2**53 and all(map(NAME.fullmatch, names)):
            return {"kind": kind, "update": update} | {k: _number(v) for k, v in row.items()}
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        pass
    got = repr(line if len(line) < 200 else line[:200] + b"...")
    raise ConfigError(where, "a row of metrics: a kind, an update and numbers by name", got)


def _number(value: object) -> float:
    """The number that `_to_line` has written; raises ValueError."""
    if type(value) in (int, float) or value in NOT_FINITE:
        return float(value)  # type: ignore[arg-type]
    raise ValueError(value)


def _to_line(row: MetricRow) -> str:
    spelled = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(spelled, allow_nan=False) + "\n"
