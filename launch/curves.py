"""Draw the curves of one or several runs: `python launch/curves.py RUN [RUN ...] --out x.png`.

Runs that differ only in their seed become one curve, their mean, with a band as wide as their
standard deviation to either side.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.plots.style import check_out, save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss, accuracy and learning rate of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    files = "PNG, PDF or SVG to write (curves.png); may be repeated"
    parser.add_argument("--out", type=Path, action="append", metavar="FILE", help=files)
    parser.add_argument("--x", choices=("epoch", "update"), default="epoch", help="horizontal axis")
    each = "a curve for each run, also of runs that differ only in their seed"
    parser.add_argument("--each", action="store_true", help=each)
    args = parser.parse_args()
    out = check_out(args.out or [Path("curves.png")])

    from irpe_ds.plots.curves import draw_curves, read_runs
    from irpe_ds.plots.seeds import group_seeds, one_each

    runs = read_runs(args.runs, args.x)
    groups = one_each(runs) if args.each else group_seeds(runs)
    save_figure(draw_curves(groups, args.x), out)


if __name__ == "__main__":
    run(main)
