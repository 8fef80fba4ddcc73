"""Summarise a run in a few lines: `python launch/summary.py runs/quickstart`."""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import command, run
from irpe_ds.environment import read_environment
from irpe_ds.errors import ConfigError, printable
from irpe_ds.runlog import METRICS, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    folder = parser.parse_args().run
    rows = read_rows(folder / METRICS)
    train, scores = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    if not train or not scores:
        raise ConfigError(f"{folder}: the run has not finished an epoch yet")
    speeds = [row["images_per_s"] for row in train if "images_per_s" in row]
    last = scores[-1]
    if not speeds or not {"top1", "epoch"} <= last.keys():
        raise ConfigError(folder / METRICS, "images_per_s, top1 and epoch of a run", "others")
    environment, quoted = read_environment(folder), shlex.quote(str(folder))
    curves, evaluate = command("launch/curves.py"), command("launch/evaluate.py")
    first, start = "", "deepspeed --module irpe_ds train"
    if curves.startswith("python"):  # in a clone
        first, start = ", after `source .venv/bin/activate`", "deepspeed launch/train.py"
    text = f"""
{folder}: top-1 {last["top1"]:.2f} % after {last["epoch"]:g} epochs, \
{statistics.median(speeds):.0f} img/s on {environment.ranks} x {environment.device}
  metrics      {folder / METRICS}, train.csv, eval.csv
  curves       {curves} {quoted} --out curves.png
  evaluate     {evaluate} --run {quoted}
Next{first}: change something and compare, here without iRPE:
  {start} --config {quoted}/config.yaml name=plain model.rpe=null
  {curves} {quoted} runs/plain --out curves.png"""
    print(printable(text))


if __name__ == "__main__":
    run(main)
