"""Convert an ImageFolder (one folder per class) to FFCV's .beton.

    python data_prep/convert.py --source imagenet/train --out imagenet/train.beton

The default stores every JPEG as it is. Beside the file comes FILE.beton.json, its manifest.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import get_args

from irpe_ds.cli import run
from irpe_ds.data.convert import convert, summary
from irpe_ds.data.images import Mode, StorageOptions


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert an ImageFolder to FFCV's .beton.")
    parser.add_argument("--source", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--out", type=Path, required=True, help="the .beton file to write")
    defaults = StorageOptions()
    parser.add_argument("--mode", choices=get_args(Mode), default=defaults.mode)
    parser.add_argument("--max-resolution", type=int, help="longest side, pixels")
    parser.add_argument("--quality", type=int, default=defaults.quality, help="of new JPEGs")
    parser.add_argument("--smart-threshold", type=int, help="bytes of pixels kept raw")
    parser.add_argument("--proportion", type=float, default=defaults.proportion)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    options = StorageOptions(
        mode=args.mode,
        max_resolution=args.max_resolution,
        quality=args.quality,
        smart_threshold=args.smart_threshold,
        proportion=args.proportion,
    )
    start = time.monotonic()
    manifest = convert(
        args.source,
        args.out,
        options,
        workers=args.workers,
        overwrite=args.overwrite,
        command=shlex.join(["python", *sys.argv]),
    )
    print(summary(manifest, args.out, start))


if __name__ == "__main__":
    run(main)
