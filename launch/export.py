"""Write the weights of a run, for irpe_ds.load, for timm and for the released iRPE code.

python launch/export.py --run runs/mine --ema --best --out exported
python launch/export.py --run runs/mine --out mine.safetensors
python launch/export.py --run runs/mine --out mine.pth

A folder is in timm's layout, config.json and model.safetensors: after `import irpe_ds`,
timm.create_model("local-dir:exported", pretrained=True) makes the model. A .safetensors holds the
same in one file, a .pth {"model": weights} as the released checkpoints do. All say what their
positions mean: grid, prefix tokens and encoding.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--best", action="store_true", help="its best checkpoint instead of its newest"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder, .safetensors or .pth file to write"
    )
    parser.add_argument("--license", help="of the weights, such as apache-2.0; for the model card")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub"
    )
    args = parser.parse_args()
    if args.out.suffix in (".bin", ".ckpt", ".pt"):
        expected = "a folder, or a name that ends in .safetensors or .pth"
        raise ConfigError("--out", expected, args.out)
    if args.push and args.out.suffix in (".pth", ".safetensors"):
        raise ConfigError("--out", "a folder, with --push", args.out)

    from irpe_ds.checkpoint import reader
    from irpe_ds.models.release import export, push

    weights = reader.weights_of(args.run, best=args.best, ema=args.ema)
    export(args.run, weights, args.out, args.license)
    print(f"{args.out}: {len(weights)} tensors of {weights}")
    if args.push:
        print(f"uploaded to {push(args.out, args.push)}")


if __name__ == "__main__":
    run(main)
