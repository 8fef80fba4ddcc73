"""Check a .beton file: every image decodes, and the file matches its manifest.

python data_prep/verify.py imagenet/train.beton
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a .beton file and its manifest.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-manifest", action="store_true", help="accept a file without one")
    args = parser.parse_args()

    from irpe_ds.data.beton.verify import verify  # PyTorch and FFCV: seconds

    info = verify(args.file, workers=args.workers, needs_manifest=not args.no_manifest)
    against = "as in its manifest" if info.manifest else "without a manifest to compare with"
    print(f"{info.path}: {info.num_samples} images decode, {against}")


if __name__ == "__main__":
    run(main)
