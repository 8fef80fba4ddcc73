"""One run of a scaling experiment: started by it on every rank, as DeepSpeed starts training."""

import argparse
from collections.abc import Generator
from contextlib import closing
from functools import partial

from irpe_ds.cli import run
from irpe_ds.config import load_config
from irpe_ds.data.loaders import Batch
from irpe_ds.runlog import RunLog
from irpe_ds.scaling.timeline import Timeline
from irpe_ds.training.distributed import leave
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
    leave()


def measure(trainer: Trainer, log: RunLog, *, warmup: int, updates: int, repeats: int) -> bool:
    """Time repetitions of some updates, then take one apart; log one row.

    `images_per_s`, `step_ms`, `tflops`, `mfu` and `data_wait` are those of the median repetition,
    left alone. `{phase}_ms`, `apart_ms`, which is their sum, and `{collective}_bytes` are means
    over the updates of the one that is taken apart (see Timeline), times over the ranks too.
    `memory_gib` is the most of any rank, from its start.
    """
    with closing(endless(trainer)) as batches:

        def run_updates(number: int) -> None:
            for _ in range(number):
                trainer.train_update(batches, log)

        run_updates(warmup)
        rows = []
        for _ in range(repeats):
            trainer.meter.read()  # all ranks start together
            run_updates(updates)
            rows.append(trainer.report(trainer.meter.read()))
        trainer.ranks.any(False)
        with Timeline(trainer) as timeline:
            run_updates(updates)
    rows.sort(key=lambda row: row["images_per_s"])
    row = rows[len(rows) // 2]
    row["slowest_images_per_s"] = rows[0]["images_per_s"]
    row["fastest_images_per_s"] = rows[-1]["images_per_s"]
    found = trainer.ranks.gather((dict(timeline.seconds), row["memory_gib"]))
    row["memory_gib"] = max(memory for _, memory in found)
    for phase in PHASES:
        seconds = sum(times.get(phase, 0.0) for times, _ in found)
        row[f"{phase}_ms"] = 1000 * seconds / (len(found) * updates)
    row["apart_ms"] = sum(row[f"{phase}_ms"] for phase in PHASES)
    row |= {f"{kind}_bytes": size / updates for kind, size in timeline.bytes.items()}
    log.log(KIND, trainer.update, row)
    return True


def endless(trainer: Trainer) -> Generator[Batch, None, None]:
    """The batches of one epoch after another, at the first one's resolution."""
    size, epoch = trainer.config.model.size_at(0), 0
    while True:
        yield from trainer.train_batches.epoch(epoch, first_pass=0, img_size=size)
        epoch += 1


if __name__ == "__main__":
    run(main)
