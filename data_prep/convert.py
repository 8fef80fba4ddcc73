"""Convert images to FFCV's .beton, read in place: nothing is unpacked.

    python data_prep/convert.py --source imagenet/train --out train.beton
    python data_prep/convert.py --source ILSVRC2012_img_train.tar --out train.beton
    python data_prep/convert.py --source ILSVRC2012_img_val.tar \
        --labels ILSVRC2012_devkit_t12.tar.gz --out val.beton
    python data_prep/convert.py --source wds/train-*.tar --classes classes.txt --out train.beton

By default every JPEG is stored as it is. After a kill, the same command resumes. Writes a manifest
(FILE.beton.json) and the hash of each sample (FILE.beton.sha256) beside the file.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.data.beton.journal import check_out
from irpe_ds.data.beton.left_out import by_extension
from irpe_ds.data.beton.manifest import LEFT_OUT, SKIPPED, DatasetManifest, beside
from irpe_ds.data.beton.options import MAX_BAD, Check, Mode, OnBad, StorageOptions, check_share
from irpe_ds.data.beton.places import target, temporary_folder
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.parallel import check_workers
from irpe_ds.errors import printable

if TYPE_CHECKING:
    from irpe_ds.data.beton.convert import Forecast


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, nargs="+", required=True, help="a folder, a .tar, or shards")
    add("--out", type=Path, required=True, help="the .beton file to write")
    add(
        "--labels",
        type=Path,
        help="of a flat tar: development kit, or one class name per line",
    )
    add("--classes", type=Path, help="of shards with numbers: class names in label order")
    defaults = StorageOptions()
    add("--mode", choices=get_args(Mode), default=defaults.mode)
    add("--longest-side", type=int, metavar="PIXELS", help="reduce longer images to this")
    add("--shortest-side", type=int, metavar="PIXELS", help="the same for the shorter side")
    add("--quality", type=int, default=defaults.quality, help="of new JPEGs (default: 90)")
    add("--proportion", type=float, default=defaults.proportion, help="share of JPEGs (0.5)")
    add("--check", choices=get_args(Check), default=defaults.check, help="header: verify later")
    add("--on-bad", choices=get_args(OnBad), default="error", help="skip: leave it out and list it")
    add("--max-bad", type=float, default=MAX_BAD, help="share that may be skipped (default: 0.01)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (all cores)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--dry-run", action="store_true", help="estimate only; write nothing")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    options = StorageOptions(
        mode=args.mode,
        longest_side=args.longest_side,
        shortest_side=args.shortest_side,
        quality=args.quality,
        proportion=args.proportion,
        check=args.check,
    )
    check_workers(args.workers)
    check_share("--max-bad", args.max_bad)
    out = target(args.out)
    if not args.dry_run:
        check_out(out, overwrite=args.overwrite)
    source = open_source(args.source, labels=args.labels, classes=args.classes)

    from irpe_ds.data.beton.convert import convert, forecast  # PyTorch and FFCV: seconds

    if args.dry_run:
        print_forecast(forecast(source, out, options, workers=args.workers))
        return
    start = time.monotonic()
    manifest = convert(
        source,
        out,
        options,
        workers=args.workers,
        on_bad=args.on_bad,
        max_bad=args.max_bad,
        overwrite=args.overwrite,
        command=shlex.join(["python", *sys.argv]),
    )
    print_result(manifest, out, time.monotonic() - start)


def print_forecast(coming: "Forecast") -> None:
    print(
        f"{coming.images} images of {coming.classes} classes, {coming.left_out} other files left "
        f"out{_counted(coming.extensions)}; about {_size(coming.size)}, and beside it "
        f"{_size(coming.journal)} until the end, {_size(coming.free)} free; about "
        f"{max(0.1, coming.seconds / 60):.2g} minutes if the disk is fast enough"
    )
    print(
        f"while images are listed, {_size(coming.temporary)} in {temporary_folder()} (TMPDIR), "
        f"{_size(coming.temporary_free)} free"
    )
    for name, reason in coming.bad.items():
        print(_shown(f"bad: {name}: {reason}"))


def _names(classes: Sequence[str]) -> str:
    """Of few classes: a folder too high shows train and val."""
    return f" ({_shown(', '.join(classes))})" if len(classes) <= 5 else ""


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.3g} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.3g} MB"


def _counted(extensions: str) -> str:
    return f" ({_shown(extensions)})" if extensions else ""


def _shown(names: str) -> str:
    return printable(names).replace("\n", "\\n")  # a name shall not look like a line of ours


def print_result(manifest: DatasetManifest, out: Path, seconds: float) -> None:
    others = f"{manifest.left_out} other files left out"
    others += _counted(by_extension(beside(out, LEFT_OUT)))
    print(
        f"{out}: {manifest.num_samples} images of {len(manifest.classes)} classes"
        f"{_names(manifest.classes)} from {manifest.kind}, {manifest.size / 1e6:.1f} MB; "
        f"{manifest.changed} converted, not stored as they were, {others}, "
        f"{manifest.duplicates} duplicates; {manifest.num_samples / seconds:.0f} img/s"
    )
    if manifest.skipped:
        print(f"{manifest.skipped} bad images are listed in {beside(out, SKIPPED)}")
    if manifest.left_out:
        print(f"files left out are listed in {beside(out, LEFT_OUT)}")
    if manifest.options["check"] == "header":
        print(f"not decoded yet: python data_prep/verify.py {out}")


if __name__ == "__main__":
    run(main)
