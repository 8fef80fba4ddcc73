"""Train a run: `deepspeed launch/train.py --config x.yaml [section.key=value ...]`.

Without a launcher, `python launch/train.py ...` trains on one rank. On SIGTERM, SIGUSR1, SIGHUP and
Ctrl-C it saves and exits with code 75 (ExitCode.REQUEUE); rerun with --resume auto to continue.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import end_process, run
from irpe_ds.errors import ExitCode

SCALARS = ("name", "output", "seed")
"""Keys of a configuration that are in no section."""


def without_dashes(arguments: list[str]) -> list[str]:
    """Overrides written as options, as `wandb agent` passes them: --train.epochs=3."""
    return [text[2:] if _is_dashed_override(text) else text for text in arguments]


def _is_dashed_override(text: str) -> bool:
    key, equals, _ = text.removeprefix("--").partition("=")
    return text.startswith("--") and bool(equals) and ("." in key or key in SCALARS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="YAML", help="the run's configuration")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|CHECKPOINT",
        help="continue from the run's newest checkpoint, or from this one",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(without_dashes(sys.argv[1:]))

    from irpe_ds.cluster.launchers import check_launch
    from irpe_ds.config import load_config
    from irpe_ds.wandb_run import trial_name

    check_launch(os.environ)
    config = load_config(args.config, args.overrides)  # before the imports that take seconds
    config = config.model_copy(update={"name": trial_name(config.name)})

    from irpe_ds.cluster.process_group import destroy_process_group
    from irpe_ds.plots.run_pictures import fit
    from irpe_ds.training.run import train

    finished = train(config, args.resume, fit)
    destroy_process_group()
    end_process(ExitCode.DONE if finished else ExitCode.REQUEUE)


if __name__ == "__main__":
    run(main)
