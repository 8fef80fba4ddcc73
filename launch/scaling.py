"""Measure how training scales: `python launch/scaling.py --config launch/configs/scaling/cpu.yaml`.

Runs a matrix of short trainings, each started as `deepspeed` starts it, and reports on them. Rerun
after an interruption, it continues; a run that fails becomes a row with its error. --report makes
the report again from a results.json alone.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError, printable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="YAML", help="the experiment")
    source.add_argument("--report", type=Path, metavar="JSON", help="results to report again")
    also = "write the figures in this format too, beside PNG; may be repeated"
    parser.add_argument("--format", choices=("pdf", "svg"), action="append", default=[], help=also)
    parser.add_argument("--before", type=Path, metavar="JSON", help="results to compare with")
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.report is not None and (args.retry or args.overrides):
        parser.error("--report takes no --retry and no overrides: it only reads")
    path = args.report or measure(args.config, args.overrides, args.retry)

    from irpe_ds.benchmark.report import write_report
    from irpe_ds.benchmark.rows import read_results_file

    results = read_results_file(path)
    if args.before is not None:
        from irpe_ds.benchmark.compare import compare

        print(printable("\n".join(compare(read_results_file(args.before), results))))
    try:
        for file in write_report(results, path.parent, [f".{name}" for name in args.format]):
            print(file)
    except OSError as error:
        raise ConfigError(f"cannot write the report: {error}") from None


def measure(config: Path, overrides: list[str], retry: bool) -> Path:
    """Run an experiment; the path of its results.json."""
    from irpe_ds.benchmark.experiment import load_experiment

    experiment = load_experiment(config, overrides)

    import torch

    if not torch.cuda.is_available():
        # Without it DeepSpeed 0.19 warns in every process that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from irpe_ds.benchmark.runner import run_experiment

    for number in (signal.SIGTERM, signal.SIGHUP):  # exit in Python, which ends the started run
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    return run_experiment(experiment, retry).path


if __name__ == "__main__":
    run(main)
