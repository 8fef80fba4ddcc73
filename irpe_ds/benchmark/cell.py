"""One run of a scaling experiment, started on every rank as training is."""

import argparse
from contextlib import closing
from functools import partial

from irpe_ds.benchmark.rows import INSTRUMENTED_STEP_MS, KIND, PHASES
from irpe_ds.benchmark.step_profiler import StepProfiler
from irpe_ds.cli import run
from irpe_ds.cluster.process_group import destroy_process_group
from irpe_ds.config import load_config
from irpe_ds.runlog import RunLog
from irpe_ds.training.run import train
from irpe_ds.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    for name in ("warmup", "updates", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    shape = {"warmup": args.warmup, "updates": args.updates, "repeats": args.repeats}
    train(load_config(args.config), work=partial(measure, **shape))
    destroy_process_group()


def measure(trainer: Trainer, log: RunLog, *, warmup: int, updates: int, repeats: int) -> bool:
    """Time repetitions of some updates, then profile one more; log one row.

    `images_per_s`, `step_ms`, `tflops`, `mfu` and `data_wait` are those of the median repetition,
    not profiled. `{phase}_ms`, their sum INSTRUMENTED_STEP_MS and `{collective}_bytes` are means
    per update of the profiled one (see StepProfiler), times also over ranks. `memory_gib` is the
    peak of any rank since its start.
    """
    loop, rows = Updates(trainer, warmup), []
    with closing(loop):
        loop.run(warmup, log)
        for _ in range(repeats):
            loop.prepare(updates, log)
            trainer.meter.read()  # a collective: all ranks start together
            loop.run(updates, log)
            rows.append(trainer.log_row(trainer.meter.read()))
        loop.prepare(updates, log)
        trainer.ranks.any_rank(False)
        with StepProfiler(trainer) as profiler:
            loop.run(updates, log)
    rows.sort(key=lambda row: row["images_per_s"])
    row = rows[(len(rows) - 1) // 2]
    row["slowest_images_per_s"] = rows[0]["images_per_s"]
    row["fastest_images_per_s"] = rows[-1]["images_per_s"]
    found = trainer.ranks.all_gather((dict(profiler.seconds), row["memory_gib"]))
    row["memory_gib"] = max(memory for _, memory in found)
    for phase in PHASES:
        seconds = sum(times.get(phase, 0.0) for times, _ in found)
        row[f"{phase}_ms"] = 1000 * seconds / (len(found) * updates)
    row[INSTRUMENTED_STEP_MS] = sum(row[f"{phase}_ms"] for phase in PHASES)
    row |= {f"{kind}_bytes": size / updates for kind, size in profiler.bytes.items()}
    log.log(KIND, trainer.update, row)
    return True


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
