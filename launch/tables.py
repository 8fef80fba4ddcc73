"""Draw the learned relative position tables of a checkpoint, a map per layer and head.

python launch/tables.py --run runs/mine --out tables.png
python launch/tables.py --config x.yaml --weights deit_small_..._shared_k.pth --layers 0,5,11
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError
from irpe_ds.plots.style import check_out, save_figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder; its newest checkpoint is drawn")
    source.add_argument("--config", type=Path, metavar="YAML", help="configuration, with --weights")
    parser.add_argument("--weights", type=Path, help=".pth or .safetensors instead of the run's")
    files = "PNG, PDF or SVG to write (tables.png); may be repeated"
    parser.add_argument("--out", type=Path, action="append", metavar="FILE", help=files)
    parser.add_argument("--on", choices=("k", "q", "v"), help="default: the first with tables")
    parser.add_argument("--layers", metavar="N,N", help="numbers from 0; default: all")
    parser.add_argument(
        "--images", type=int, default=64, help="images of data.val that the mean is taken over"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    out = check_out(args.out or [Path("tables.png")])
    if args.images < 1:
        raise ConfigError("--images", "at least 1", args.images)
    if args.run is None and args.weights is None:
        raise ConfigError("--config needs --weights, as it names no run")

    from irpe_ds.config import load_config, load_run_config

    if args.config is not None:
        config = load_config(args.config, args.overrides)
    else:
        config = load_run_config(args.run, args.overrides)

    from irpe_ds.checkpoint import reader
    from irpe_ds.plots.tables import draw_tables, read_maps

    weights = args.weights or reader.weights_of(args.run)
    on, maps, inert = read_maps(config, weights, args.on, args.layers, args.images)
    save_figure(draw_tables(maps, on, config.name, inert), out)


if __name__ == "__main__":
    run(main)
