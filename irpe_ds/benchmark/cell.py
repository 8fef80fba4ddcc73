"""One run of a scaling experiment: started by it on every rank, as DeepSpeed starts training."""

import argparse
from contextlib import closing
from functools import partial

from timm.layers import to_2tuple

from irpe_ds.benchmark.step_profiler import Timeline
from irpe_ds.cli import run
from irpe_ds.cluster.process_group import destroy_process_group
from irpe_ds.config import load_config
from irpe_ds.runlog import RunLog
from irpe_ds.training.run import train
from irpe_ds.training.trainer import Trainer

KIND = "scaling"
"""Of the one row that it logs."""
PHASES = ("data", "forward", "backward", "optimizer", "communication")


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
    """Time repetitions of some updates, then take one apart; log one row.

    `images_per_s`, `step_ms`, `tflops`, `mfu` and `data_wait` are those of the median repetition,
    left alone. `{phase}_ms`, `apart_ms`, which is their sum, and `{collective}_bytes` are means
    over the updates of the one that is taken apart (see Timeline), times over the ranks too.
    `memory_gib` is the most of any rank, from its start.
    """
    trainer.vote.restart()
    stream, rows = Stream(trainer, warmup), []
    with closing(stream):
        stream.run(warmup, log)
        for _ in range(repeats):
            stream.prepare(updates, log)
            trainer.meter.read()  # all ranks start together
            stream.run(updates, log)
            rows.append(trainer.report(trainer.meter.read()))
        stream.prepare(updates, log)
        trainer.ranks.any_rank(False)
        with Timeline(trainer) as timeline:
            stream.run(updates, log)
    rows.sort(key=lambda row: row["images_per_s"])
    row = rows[(len(rows) - 1) // 2]
    row["slowest_images_per_s"] = rows[0]["images_per_s"]
    row["fastest_images_per_s"] = rows[-1]["images_per_s"]
    found = trainer.ranks.all_gather((dict(timeline.seconds), row["memory_gib"]))
    row["memory_gib"] = max(memory for _, memory in found)
    for phase in PHASES:
        seconds = sum(times.get(phase, 0.0) for times, _ in found)
        row[f"{phase}_ms"] = 1000 * seconds / (len(found) * updates)
    row["apart_ms"] = sum(row[f"{phase}_ms"] for phase in PHASES)
    row |= {f"{kind}_bytes": size / updates for kind, size in timeline.bytes.items()}
    log.log(KIND, trainer.update, row)
    return True


class Stream:
    """Updates of one epoch after another, at the first one's resolution."""

    def __init__(self, trainer: Trainer, warmup: int) -> None:
        self._trainer, self._warmup = trainer, warmup
        self._epoch, self._left = -1, 0
        self._begin()

    def _begin(self) -> None:
        if self._epoch >= 0:
            self.close()
        self._epoch, self._left = self._epoch + 1, self._trainer.plan.updates_per_epoch
        size = to_2tuple(self._trainer.config.model.size_at(0))
        self._batches = self._trainer.train_batches.epoch(self._epoch, img_size=size)

    def prepare(self, updates: int, log: RunLog) -> None:
        """Go on to the next epoch if this one ends too soon, where epochs are long enough.

        What a loader needs to start is no part of a repetition then.
        """
        whole = self._trainer.plan.updates_per_epoch >= updates + self._warmup
        if self._left < updates and whole:
            self._begin()
            self.run(self._warmup, log)

    def run(self, updates: int, log: RunLog) -> None:
        """Train so many updates, stopping at a signal as training does."""
        for _ in range(updates):
            if not self._left:
                self._begin()
            self._trainer.train_update(self._batches, log)
            self._left -= 1
            self._trainer.raise_if_stopped()

    def close(self) -> None:
        self._batches.close()


if __name__ == "__main__":
    run(main)
