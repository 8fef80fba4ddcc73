"""Draw the curves of one or several runs: `python launch/curves.py RUN [RUN ...] --out x.png`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss, accuracy and learning rate of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG to write")
    parser.add_argument("--x", choices=("epoch", "update"), default="epoch", help="horizontal axis")
    args = parser.parse_args()
    if args.out.suffix != ".png":
        raise ConfigError("--out", "a name that ends in .png", args.out)

    from irpe_ds.plots.curves import draw_curves, read_runs
    from irpe_ds.plots.style import save_figure

    figure = draw_curves(read_runs(args.runs, args.x), args.x)
    print(save_figure(figure, args.out))


if __name__ == "__main__":
    run(main)
