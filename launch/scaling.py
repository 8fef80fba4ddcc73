"""Measure how training scales: `python launch/scaling.py --config launch/configs/scaling/cpu.yaml`.

Runs a matrix of short trainings, each as `deepspeed` starts them, and reports on them. Killed and
called again it goes on; a run that fails is a row with its error. --report makes the report again
from a results.json alone.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="YAML", help="the experiment")
    what.add_argument("--report", type=Path, metavar="JSON", help="results of one, to report again")
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.report is not None and (args.retry or args.overrides):
        parser.error("--report takes no --retry and no overrides: it only reads")

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from irpe_ds.benchmark.experiment import load_experiment
    from irpe_ds.benchmark.report import write_report
    from irpe_ds.benchmark.runner import read_results_file, run_experiment

    if args.report is None:
        for number in (signal.SIGTERM, signal.SIGHUP):  # the run that it has started ends with it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        path = run_experiment(load_experiment(args.config, args.overrides), args.retry).path
    else:
        path = args.report
    for file in write_report(read_results_file(path), path.parent):
        print(file)


if __name__ == "__main__":
    run(main)
