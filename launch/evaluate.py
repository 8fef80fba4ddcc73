"""Evaluate weights on the validation set, counting every image once on any number of ranks.

python launch/evaluate.py --run runs/quickstart
deepspeed launch/evaluate.py --config x.yaml --weights deit_small_..._shared_k.pth
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder; its newest checkpoint is evaluated")
    source.add_argument("--config", type=Path, metavar="YAML", help="configuration, with --weights")
    parser.add_argument("--weights", type=Path, help="of a file instead of the run")
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the run's weights"
    )
    parser.add_argument(
        "--best", action="store_true", help="its best checkpoint instead of its newest"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per rank and pass")
    parser.add_argument(
        "--pipeline",
        choices=("timm", "ffcv"),
        default="timm",
        help="timm: bicubic, as published (default); ffcv: by area, as in training, faster",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    from irpe_ds.cluster.launchers import check_launch
    from irpe_ds.config import load_config, load_run_config

    check_launch(os.environ)
    overrides = [f"data.pipeline={args.pipeline}", *args.overrides]
    if args.config is not None:
        config = load_config(args.config, overrides)
    else:
        config = load_run_config(args.run, overrides)
    if args.run is None and args.weights is None:
        raise ConfigError("--config needs --weights; --run evaluates the weights of a run")

    from irpe_ds.checkpoint import reader
    from irpe_ds.cluster.waiting import Waiting
    from irpe_ds.training.datasets import check_names, open_checked
    from irpe_ds.training.evaluation import describe, evaluate_weights

    if args.run is not None:
        check_names(config, open_checked(config, "val"), args.run)
    with Waiting("reading weights"):
        weights = args.weights or reader.weights_of(args.run, best=args.best, ema=args.ema)
    scores = evaluate_weights(config, weights, args.batch_size)
    if scores is not None:
        path = config.data.path("val")
        print(f"{describe(scores)} of {path} (pipeline {config.data.pipeline}): {weights}")
        if args.run is not None:
            note_pipeline(load_run_config(args.run).data.pipeline, config.data.pipeline)


def note_pipeline(of_run: str, here: str) -> None:
    """Say why these scores are not those that the run has logged, if so."""
    if of_run != here:
        how = {"timm": "bicubically, as published", "ffcv": "by area"}
        print(
            f"The run's own scores are of pipeline {of_run}, which resizes {how[of_run]}; {here} "
            f"resizes {how[here]}, so the scores may differ; --pipeline {of_run} repeats the run's"
        )


if __name__ == "__main__":
    run(main)
