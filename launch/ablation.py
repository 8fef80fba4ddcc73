"""Measure what a part of the recipe brings: trainings with and without it, by several seeds.

    python launch/ablation.py --config launch/configs/ablation/digits.yaml --jobs 2

Each training has one rank. Reports means, deviations and a picture. Rerun after an interruption, it
continues; finished trainings are not repeated.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the ablation")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.jobs < 1:
        parser.error("--jobs: expected a positive number")

    from irpe_ds.benchmark.ablation import load_ablation, run_ablation, summarise

    common, trials = load_ablation(args.config, args.overrides)
    train = [sys.executable, str(Path(__file__).with_name("train.py"))]
    results = run_ablation(common, trials, train, args.jobs)
    summaries = summarise(results)
    print("\n".join(map(str, summaries)))

    from irpe_ds.plots.ablation import draw_ablation
    from irpe_ds.plots.style import save_figure

    row = results["rows"][0]
    images = int(row["images"])
    figure = draw_ablation(
        common.name,
        {summary.variant: [*summary.top1.values()] for summary in summaries},
        f"{images:,} validation images; dots: seeds; line: mean; box: one standard deviation.\n"
        f"{row['device']}, torch {row['torch']}, commit {str(row['commit'])[:7]}",
    )
    save_figure(figure, [common.folder / "ablation.png"])


if __name__ == "__main__":
    run(main)
