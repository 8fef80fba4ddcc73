"""One run of a scaling experiment, started on every rank as training is."""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from statistics import fmean
from typing import Any

from irpe_ds.benchmark.gpu_monitor import GpuMonitor
from irpe_ds.benchmark.rows import INSTRUMENTED_STEP_MS, KIND, PHASES, RANKS
from irpe_ds.benchmark.step_profiler import StepProfiler
from irpe_ds.cli import end_process, run
from irpe_ds.cluster.process_group import destroy_process_group
from irpe_ds.config import load_config
from irpe_ds.errors import ExitCode
from irpe_ds.files import replace_file
from irpe_ds.runlog import RunLog, writing
from irpe_ds.training.run import train
from irpe_ds.training.trace import SKIPPED, Trace
from irpe_ds.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    for name in ("warmup", "updates", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    shape = {"warmup": args.warmup, "updates": args.updates, "repeats": args.repeats}
    config = load_config(args.config)
    section = config.train.model_copy(update={"profile": None})  # not while updates are timed
    work = partial(measure, **shape, traced=config.train.profile)
    train(config.model_copy(update={"train": section}), work=work)
    destroy_process_group()
    end_process(ExitCode.DONE)


def measure(
    trainer: Trainer, log: RunLog, *, warmup: int, updates: int, repeats: int, traced: int | None
) -> bool:
    """Time repetitions of some updates, then profile one more; log one row; trace a few updates.

    `images_per_s`, `step_ms`, `tflops`, `mfu` and `data_wait` are those of the median repetition,
    not profiled. `{phase}_ms`, their sum INSTRUMENTED_STEP_MS and `{collective}_bytes` are means
    per update of the profiled one (see StepProfiler), times also over ranks. `memory_gib` is the
    peak of any rank since its start. The file RANKS has what `rank_columns` gives.
    """
    loop, rows = Updates(trainer, warmup), []
    with closing(loop):
        loop.run(warmup, log)
        with GpuMonitor(trainer.ranks.device) as gpu:
            for _ in range(repeats):
                loop.prepare(updates, log)
                trainer.meter.read()  # a collective: all ranks start together
                loop.run(updates, log)
                rows.append(trainer.log_row(trainer.meter.read()))
        loop.prepare(updates, log)
        trainer.ranks.any_rank(False)
        with StepProfiler(trainer) as profiler:
            loop.run(updates, log)
        if traced is not None:
            with Trace(traced, trainer.config.folder, trainer.ranks) as trainer.trace:
                loop.run(SKIPPED + traced, log)
    rows.sort(key=lambda row: row["images_per_s"])
    row = rows[(len(rows) - 1) // 2]
    row["slowest_images_per_s"] = rows[0]["images_per_s"]
    row["fastest_images_per_s"] = rows[-1]["images_per_s"]
    own = {phase: 1000 * profiler.seconds.get(phase, 0.0) / updates for phase in PHASES}
    found = trainer.ranks.all_gather((own, row["memory_gib"], gpu.means()))
    row["memory_gib"] = max(memory for _, memory, _ in found)
    for phase in PHASES:
        row[f"{phase}_ms"] = fmean(times[phase] for times, _, _ in found)
    row[INSTRUMENTED_STEP_MS] = sum(row[f"{phase}_ms"] for phase in PHASES)
    row |= {f"{kind}_bytes": size / updates for kind, size in profiler.bytes.items()}
    if trainer.ranks.is_main:
        columns = rank_columns([(times, gpu) for times, _, gpu in found], trainer.ranks.hostnames)
        path = trainer.config.folder / RANKS
        with writing(path):
            replace_file(path, json.dumps(columns))
    log.log(KIND, trainer.update, row)
    return True


def rank_columns(
    found: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], hostnames: Sequence[str]
) -> dict[str, Any]:
    """Columns with a value for each rank, and the rank on which an update takes longest.

    `rank_ms` is the time of an update without communication, in which a rank waits for slower ones.
    `rank_mhz`, `rank_watt` and `rank_celsius` are there if all ranks have a GPU that tells them.

    Args:
        found: milliseconds by phase, and GpuMonitor's means, of each rank.
    """
    every = [
        sum(ms for phase, ms in times.items() if phase != "communication") for times, _ in found
    ]
    slowest = max(range(len(every)), key=every.__getitem__)
    columns: dict[str, Any] = {"rank_ms": every, "slowest_rank": slowest}
    columns["slowest_host"] = hostnames[slowest]
    for name in found[0][1]:
        if all(name in gpu for _, gpu in found):
            columns[f"rank_{name}"] = [gpu[name] for _, gpu in found]
    return columns


class Updates:
    """Updates of one epoch after another, all at the resolution of the first."""

    def __init__(self, trainer: Trainer, warmup: int) -> None:
        self._trainer, self._warmup = trainer, warmup
        self._epoch, self._left = -1, 0
        self._start_epoch()

    def _start_epoch(self) -> None:
        if self._epoch >= 0:
            self.close()
        self._epoch, self._left = self._epoch + 1, self._trainer.length.updates_per_epoch
        size = self._trainer.config.model.size_at(0)
        self._batches = self._trainer.train_batches.epoch(self._epoch, img_size=size)

    def prepare(self, updates: int, log: RunLog) -> None:
        """Start the next epoch if this one ends too soon and epochs are long enough.

        Then no repetition contains a loader's start.
        """
        whole = self._trainer.length.updates_per_epoch >= updates + self._warmup
        if self._left < updates and whole:
            self._start_epoch()
            self.run(self._warmup, log)

    def run(self, updates: int, log: RunLog) -> None:
        """Train a number of updates; a signal stops them as it stops training."""
        for _ in range(updates):
            if not self._left:
                self._start_epoch()
            self._trainer.train_update(self._batches, log)
            self._left -= 1
            self._trainer.raise_if_stopped()

    def close(self) -> None:
        self._batches.close()


if __name__ == "__main__":
    run(main)
