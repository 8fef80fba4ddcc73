"""Print the zoo: buckets, parameters and MACs of the models, accuracies as published."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run

PLAIN = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
NOTE = """
Parameters and MACs are counted from the models here, MACs in matrix products of one 224 x 224
image; (paper) is what the authors published. Where RPE is on values (qkv) the paper's count is
higher: it multiplies every key's weight with an expanded (L, L, D) table, here the weights are
summed per bucket first, which saves layers * L * (L - buckets) * width multiplications. Buckets are
those that occur on the grid of 14 x 14 patches, of those that a table has; with cross, of both."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()

    from irpe_ds.models.flops import params_and_macs
    from irpe_ds.models.zoo import ZOO
    from irpe_ds.rpe.tables import build_maps, count_buckets

    head = "params (M) | (paper) | MACs (M) | (paper) | top-1 (paper) | top-5 (paper)"
    print(f"| model | buckets in use | {head} |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (*PLAIN, *ZOO):
        params, macs = params_and_macs(name)
        row = ZOO.get(name)
        paper = (row.params_m, row.macs_m, row.top1, row.top5) if row else (None,) * 4
        cells = ["" if figure is None else str(figure) for figure in paper]
        buckets = count_buckets(build_maps(row.rpe, 14, 14, skip=1)) if row else ""
        counted = (buckets, f"{params / 1e6:.2f}", cells[0], f"{macs / 1e6:.0f}", *cells[1:])
        print(f"| `{name}` | {' | '.join(counted)} |")
    print(NOTE)


if __name__ == "__main__":
    run(main)
