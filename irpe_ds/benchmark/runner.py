"""Runs the cells of a scaling experiment, each started as training is, and collects their rows."""

import contextlib
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

from irpe_ds.benchmark.experiment import Cell, Experiment, Scaling
from irpe_ds.benchmark.rows import KIND, LIMIT, RANKS, CellRow, RankColumns, Results, SavedLink
from irpe_ds.cluster.launchers import free_port
from irpe_ds.cluster.process_group import device_type
from irpe_ds.environment import read_environment
from irpe_ds.errors import CheckpointError, ConfigError, printable
from irpe_ds.files import open_own, read_regular, replace_file
from irpe_ds.planner.zero import read_zero
from irpe_ds.runlog import METRICS, read_rows
from irpe_ds.schema import parse_json
from irpe_ds.training.datasets import check_data, resolve
from irpe_ds.training.deepspeed_config import micro_batch
from irpe_ds.training.start import check_folder, lock

END_SECONDS = 40
"""For a run to end after a signal: DeepSpeed's launcher (0.19) gives a rank 30."""


def run_experiment(
    experiment: Experiment, retry: bool = False, say: Callable[[str], None] = print
) -> Results:
    """Run the cells without a row; one that fails gets a row with its error.

    Args:
        retry: run failed cells again.

    Raises:
        CheckpointError: another process runs the experiment.
        ConfigError: it was run with another configuration, or a ZeRO JSON has a mistake.
    """
    folder = experiment.config.folder
    for cell in experiment.cells:
        read_zero(cell.config.train.deepspeed)
    check_data(resolve(experiment.config).config)
    check_folder(experiment.config)
    with lock(folder) as held:
        results = Results(experiment)
        if results.links is None or (retry and "error" in results.links):
            links = check_links(experiment, held)
            results.add_links(links)
            if "error" in links:
                say(printable(f"links: failed: {links['error']}"))
        for number, cell in enumerate(experiment.cells, 1):
            place = f"[{number}/{len(experiment.cells)}] {cell}"
            known = results.rows.get(cell.key)
            if known is None or known.get("zero") != cell.zero or (retry and "error" in known):
                results.add(run_cell(experiment, cell, held))
            else:
                place += " (known)"
            say(printable(f"{place}: {_summary(results.rows[cell.key])}"))
    return results


def check_links(experiment: Experiment, held: TextIO) -> dict[str, Any]:
    """The links between the ranks of the largest cell: `rows` (see `links.measure`), or `error`."""
    largest = max(experiment.cells, key=lambda cell: (cell.ranks, cell.nodes))
    scaling, folder = experiment.scaling, experiment.config.folder
    if largest.ranks == 1 or not scaling.link_mib:
        return {"rows": []}
    out = folder / "links.json"
    options = [f"--out={out}", f"--join_seconds={experiment.config.train.join_seconds}"]
    sizes = ["--mib", *map(str, scaling.link_mib)]
    try:
        start = launcher(scaling, largest, "irpe_ds.benchmark.links")
        _launch([*start, *options, *sizes], folder / "links.log", scaling.timeout, held)
        rows = parse_json(read_regular(out, LIMIT), list[SavedLink], out, ConfigError)
        return {"rows": rows}
    except (ConfigError, CellError, OSError) as error:
        return {"error": str(error)}


def _summary(row: CellRow) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    return f"{row['images_per_s']:,.0f} img/s, {row['step_ms']:,.0f} ms per update"


def run_cell(experiment: Experiment, cell: Cell, held: TextIO) -> CellRow:
    """The row of a cell, from a run of its own, which holds the lock while it runs."""
    row = _cell_facts(experiment, cell)
    started = time.monotonic()
    try:
        row |= {"micro_batch": micro_batch(cell.config, cell.ranks)}
        row |= _measure(experiment, cell, held)
    except (ConfigError, CellError) as error:
        row["error"] = str(error)
    return row | {"seconds": round(time.monotonic() - started, 1)}


class CellError(Exception):
    """The run of a cell failed."""


def _cell_facts(experiment: Experiment, cell: Cell) -> CellRow:
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


def _measure(experiment: Experiment, cell: Cell, held: TextIO) -> CellRow:
    """Start the run, wait for it, and read what it logged."""
    folder = cell.config.folder
    if folder.exists():  # from a run that was killed
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    replace_file(file, cell.config.dump())
    output = folder.with_suffix(".log")
    _launch(command(experiment, cell, file), output, experiment.scaling.timeout, held)
    try:
        (row,) = (row for row in read_rows(folder / METRICS) if row["kind"] == KIND)
        environment = read_environment(folder)
        ranks = read_regular(folder / RANKS, LIMIT)
        row |= parse_json(ranks, RankColumns, folder / RANKS, CheckpointError)
    except (OSError, ValueError):
        raise CellError(f"the run ended without a result; see {output}") from None
    numbers = {key: value for key, value in row.items() if key not in ("kind", "update")}
    packages = environment.packages
    return numbers | {
        "impl": environment.attention_op.get("name"),
        "device": environment.device,
        "torch": packages.get("torch"),
        "deepspeed_version": packages.get("deepspeed"),
        "commit": environment.commit,
    }


def command(experiment: Experiment, cell: Cell, file: Path) -> list[str]:
    """The command line that starts the ranks of a cell; raises what `launcher` does."""
    scaling = experiment.scaling
    shape = {"warmup": scaling.warmup, "updates": scaling.updates, "repeats": scaling.repeats}
    options = [f"--{name}={number}" for name, number in shape.items()]
    start = launcher(scaling, cell, "irpe_ds.benchmark.cell")
    return [*start, f"--config={file}", *options]


def launcher(scaling: Scaling, cell: Cell, module: str) -> list[str]:
    """The command line that starts a module on the ranks of a cell.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES has fewer GPUs than the cell has ranks.
    """
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    hosts = ["--num_nodes", str(cell.nodes), "--num_accelerators", str(cell.ranks_per_node)]
    # DeepSpeed's launcher (0.19) ignores CUDA_VISIBLE_DEVICES beside --num_accelerators and would
    # take GPUs from 0 on; test_a_cell_gets_the_gpus_that_its_user_sees shows the command.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and scaling.hostfile is None and device_type() == "cuda":
        gpus = visible.split(",")
        if len(gpus) < cell.ranks_per_node:
            raise ConfigError("CUDA_VISIBLE_DEVICES", f"{cell.ranks_per_node} GPUs", visible)
        hosts = ["--include", f"localhost:{','.join(gpus[: cell.ranks_per_node])}"]
    hosts += ["--hostfile", str(scaling.hostfile or "/dev/null"), "--master_port", str(free_port())]
    hosts += ["--force_multi"] if scaling.hostfile else []  # one node is started as several are
    return [*runner, *hosts, "--module", module]


def _launch(command: list[str], output: Path, timeout: float, held: TextIO) -> None:
    """Run a command, and all that it starts, to its end.

    It inherits the lock: if this process is killed, no other can start before the command ends.

    Raises:
        CellError: the command failed or timed out.
    """
    with open_own(output, "w") as file:
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
        errors = [line for line in lines if "error: " in line.lower()]
        what = errors[0].strip() if errors else f"exit code {code}"
        raise CellError(f"{what}; see {output}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it started; DeepSpeed's runner ends what runs on other hosts."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
