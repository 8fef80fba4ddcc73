"""Write the weights of a run to one file, for timm and for the released iRPE code.

python launch/export.py --run runs/deit-small-k --ema --best --out deit_small_k.safetensors
python launch/export.py --run runs/deit-small-k --out deit_small_k.pth

A .pth holds {"model": weights} as the released checkpoints do, a .safetensors its SHA-256. Both say
what their positions mean: grid, prefix tokens and encoding. They have the released keys:
timm.create_model("deit_small_patch16_224_ctx_product_50_shared_k", checkpoint_path=...) loads them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError

SUFFIXES = (".safetensors", ".pth")


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
        "--out", type=Path, required=True, help=".safetensors or .pth file to write"
    )
    args = parser.parse_args()
    if args.out.suffix not in SUFFIXES:
        raise ConfigError("--out", "a name that ends in .safetensors or .pth", args.out)

    import torch

    from irpe_ds.checkpoint import reader
    from irpe_ds.checkpoint.shards import write_whole
    from irpe_ds.files import atomic_write
    from irpe_ds.models.build import saved_positions
    from irpe_ds.models.positions import KEY

    source = reader.weights_of(args.run, best=args.best, ema=args.ema)
    positions = saved_positions(source)
    said = {} if positions is None else {KEY: positions.to_json()}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as partial:
            if args.out.suffix == ".pth":
                torch.save({"model": dict(source), **said}, partial)
            else:
                write_whole(partial, source.files, source.keys_in_files, said)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {args.out}: {error}") from None
    print(f"{args.out}: {len(source)} tensors of {source}")


if __name__ == "__main__":
    run(main)
