"""Runs the cells of a scaling experiment, each as training is started, and keeps what they give."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from irpe_ds.benchmark.cell import KIND
from irpe_ds.benchmark.experiment import Cell, Experiment
from irpe_ds.cluster.launchers import free_port
from irpe_ds.cluster.process_group import device_type
from irpe_ds.errors import ConfigError
from irpe_ds.files import replace_file
from irpe_ds.runlog import METRICS, read_rows
from irpe_ds.training.deepspeed_config import micro_batch
from irpe_ds.training.evaluation import check_data
from irpe_ds.training.start import check_folder, lock

RESULTS = "results.json"
END_SECONDS = 40
"""For a run that is to end: DeepSpeed's launcher leaves 30 to a rank."""
Row = dict[str, Any]


class Results:
    """The file with all rows of an experiment: whole after every one of them.

    Raises:
        ConfigError: there is one already, of cells that cannot be compared with these.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.path = experiment.config.folder / RESULTS
        self._name, self._settings = experiment.config.name, experiment.settings
        self.rows: dict[str, Row] = {}
        if not self.path.exists():
            return
        saved = read_results_file(self.path)
        self.rows = {row["key"]: row for row in saved["rows"]}
        found = difference(saved["settings"], self._settings)
        if found is not None:
            key, before, now = found
            expected = f"{before!r}, as the cells in {self.path} have it, or name=... for others"
            raise ConfigError(key, expected, repr(now))

    def add(self, row: Row) -> None:
        """Enter a row, instead of one of the same cell."""
        self.rows[row["key"]] = row
        content = {
            "name": self._name,
            "settings": self._settings,
            "rows": list(self.rows.values()),
        }
        replace_file(self.path, json.dumps(content, indent=1) + "\n")


def read_results_file(path: Path) -> dict[str, Any]:
    """The content of a results.json: name, settings, rows.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text())
        rows = content["rows"]
        if {"name", "settings"} <= content.keys() and all(
            {"key", "axes"} <= row.keys() for row in rows
        ):
            return dict(content)
    except OSError as error:
        raise ConfigError(path, "the results of a scaling experiment", error.strerror) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(path, "the results of a scaling experiment", "another file")


def difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose value differs between two nested dictionaries."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (key, before, now)
    for name in {**before, **now}:
        inner = f"{key}.{name}" if key else name
        found = difference(before.get(name), now.get(name), inner)
        if found is not None:
            return found
    return None


def run_experiment(
    experiment: Experiment, retry: bool = False, say: Callable[[str], None] = print
) -> Results:
    """Run the cells that have no row yet; one that fails gets a row with its error.

    Args:
        retry: run those again that have failed.

    Raises:
        ConfigError: another process is at it, or it has been run with other settings.
    """
    folder = experiment.config.folder
    check_data(experiment.config)
    check_folder(experiment.config)
    with lock(folder) as held:
        results = Results(experiment)
        for number, cell in enumerate(experiment.cells, 1):
            place = f"[{number}/{len(experiment.cells)}] {cell}"
            known = results.rows.get(cell.key)
            if known is None or known["zero"] != cell.zero or (retry and "error" in known):
                results.add(run_cell(experiment, cell, held))
            else:
                place += " (known)"
            say(f"{place}: {_summary(results.rows[cell.key])}")
    return results


def _summary(row: Row) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    return f"{row['images_per_s']:,.0f} img/s, {row['step_ms']:,.0f} ms an update"


def run_cell(experiment: Experiment, cell: Cell, held: TextIO) -> Row:
    """The row of a cell, from a run of its own; it holds on to a lock as long as it runs."""
    row = _describe(experiment, cell)
    started = time.monotonic()
    try:
        row |= {"micro_batch": micro_batch(cell.config, cell.ranks)}
        row |= _measure(experiment, cell, held)
    except (ConfigError, CellError) as error:
        row["error"] = str(error)
    return row | {"seconds": round(time.monotonic() - started, 1)}


class CellError(Exception):
    """The run of a cell has failed."""


def _describe(experiment: Experiment, cell: Cell) -> Row:
    config = cell.config
    return {
        "key": cell.key,
        "axes": dict(cell.axes),
        "scaling": "weak" if "micro_batch" in cell.axes else "strong",
        "nodes": cell.nodes,
        "ranks_per_node": cell.ranks_per_node,
        "ranks": cell.ranks,
        "model": config.model.name,
        "precision": config.train.precision,
        "rpe": "" if config.model.rpe is None else config.model.rpe.on,
        "deepspeed": config.train.deepspeed.stem,
        "stage": cell.stage,
        "zero": cell.zero,
        "accumulation": config.train.accumulation,
        "global_batch": config.train.global_batch,
        "network": experiment.scaling.network,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _measure(experiment: Experiment, cell: Cell, held: TextIO) -> Row:
    """Start the run, wait for it, and read what it has logged."""
    folder = cell.config.folder
    if folder.exists():  # of a run that was killed
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(cell.config.dump())
    output = folder.with_suffix(".log")
    _launch(command(experiment, cell, file), output, experiment.scaling.timeout, held)
    try:
        (row,) = (row for row in read_rows(folder / METRICS) if row["kind"] == KIND)
        environment = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        raise CellError(f"it ended without a result; see {output}") from None
    numbers = {key: value for key, value in row.items() if key not in ("kind", "update")}
    packages = environment["packages"]
    return numbers | {
        "impl": environment["attention_op"]["name"],
        "device": environment["device"],
        "torch": packages["torch"],
        "deepspeed_version": packages["deepspeed"],
        "commit": environment["commit"],
    }


def command(experiment: Experiment, cell: Cell, file: Path) -> list[str]:
    """What starts the ranks of a cell.

    Raises:
        ConfigError: this machine shows fewer GPUs than the cell has ranks.
    """
    scaling = experiment.scaling
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    hosts = ["--num_nodes", str(cell.nodes), "--num_accelerators", str(cell.ranks_per_node)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # which DeepSpeed ignores beside a number
    if visible and scaling.hostfile is None and device_type() == "cuda":
        gpus = visible.split(",")
        if len(gpus) < cell.ranks_per_node:
            raise ConfigError("CUDA_VISIBLE_DEVICES", f"{cell.ranks_per_node} GPUs", visible)
        hosts = ["--include", f"localhost:{','.join(gpus[: cell.ranks_per_node])}"]
    hosts += ["--hostfile", str(scaling.hostfile or "/dev/null"), "--master_port", str(free_port())]
    hosts += ["--force_multi"] if scaling.hostfile else []  # one node as several are started
    shape = {"warmup": scaling.warmup, "updates": scaling.updates, "repeats": scaling.repeats}
    options = [f"--{name}={number}" for name, number in shape.items()]
    return [*runner, *hosts, "--module", "irpe_ds.benchmark.cell", f"--config={file}", *options]


def _launch(command: list[str], output: Path, timeout: float, held: TextIO) -> None:
    """Run a command to its end, with all that it starts.

    It inherits the lock: should this process be killed, no other can start before it has ended.

    Raises:
        CellError: it failed, or took too long.
    """
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=[held.fileno()],
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CellError(f"not finished after {timeout:g} s; see {output}") from None
        finally:
            _end(process)
    if code:
        lines = output.read_text(errors="replace").splitlines()
        told = [line for line in lines if "error: " in line.lower()]
        what = told[0].strip() if told else f"exit code {code}"
        raise CellError(f"{what}; see {output}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it has started; DeepSpeed's runner ends what is on other hosts."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
