r"""Convert images to FFCV's .beton, read in place: nothing is unpacked.

    python data_prep/convert.py --source imagenet/train --out train.beton
    python data_prep/convert.py --source ILSVRC2012_img_train.tar --out train.beton
    python data_prep/convert.py --source ILSVRC2012_img_val.tar \
        --labels ILSVRC2012_devkit_t12.tar.gz --out val.beton
    python data_prep/convert.py --source wds/train-*.tar --classes classes.txt --out train.beton
    python data_prep/convert.py --source CLS-LOC/val --labels LOC_val_solution.csv --out val.beton
    python data_prep/convert.py --source tiny-imagenet-200.zip/tiny-imagenet-200/train --out t.beton
    srun python data_prep/convert.py --source imagenet/train --out train.beton --shards 64

By default every JPEG is stored as it is. After a kill, the same command resumes. Writes a manifest
(FILE.beton.json) and the hash of each sample (FILE.beton.sha256) beside the file.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import command, run
from irpe_ds.data.beton.journal import check_out
from irpe_ds.data.beton.left_out import by_extension
from irpe_ds.data.beton.manifest import LEFT_OUT, SKIPPED, DatasetManifest, beside
from irpe_ds.data.beton.options import (
    MAX_BAD,
    Check,
    ClassLevel,
    Mode,
    OnBad,
    OtherClasses,
    SourceOptions,
    StorageOptions,
    check_shards,
    check_share,
)
from irpe_ds.data.beton.places import target, temporary_folder
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.parallel import check_workers, local_share
from irpe_ds.errors import ConfigError, printable

if TYPE_CHECKING:
    from irpe_ds.data.beton.forecast import Forecast
    from irpe_ds.data.beton.listing import Listing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        type=Path,
        nargs="+",
        required=True,
        help="a folder, a .tar or .zip or a folder in it, class tars, shards, or .parquet files",
    )
    add("--out", type=Path, required=True, help="the .beton file to write")
    add_choices(parser.add_argument_group("classes and images"))
    defaults = StorageOptions()
    text = "how images are stored; transcode: JPEGs anew without loss, for faster crops"
    add("--mode", choices=get_args(Mode), default=defaults.mode, help=text)
    add("--longest-side", type=int, metavar="PIXELS", help="reduce longer images to this")
    add("--shortest-side", type=int, metavar="PIXELS", help="the same for the shorter side")
    add("--quality", type=int, default=defaults.quality, help="of new JPEGs (default: 90)")
    add("--proportion", type=float, default=defaults.proportion, help="share of JPEGs (0.5)")
    add("--check", choices=get_args(Check), default=defaults.check, help="header: verify later")
    add("--on-bad", choices=get_args(OnBad), default="error", help="skip: leave it out and list it")
    cores = local_share(len(os.sched_getaffinity(0)))
    add("--max-bad", type=float, default=MAX_BAD, help="share that may be skipped (default: 0.01)")
    add("--workers", type=int, default=cores, help="threads (this process's share of the cores)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add(
        "--shards",
        type=int,
        metavar="N",
        help="write N files and an index; processes that run the same command divide them up",
    )
    add("--dry-run", action="store_true", help="estimate only; write nothing")
    return parser.parse_args()


def add_choices(group: "argparse._ArgumentGroup") -> None:
    """The options that say which images are taken and what their classes are."""
    add = group.add_argument
    add("--labels", type=Path, metavar="FILE", help="`name label` lines, CSV, or development kit")
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names in label order, or a .beton",
    )
    add("--other-classes", choices=get_args(OtherClasses), default="error", help="than those")
    add("--class-level", choices=get_args(ClassLevel), help="of nested folders: the first, or all")
    add("--image-key", metavar="NAME", help="ending in shards, or column, of images")
    add("--label-key", metavar="NAME", help="ending, JSON field or column of labels")
    add("--subset", type=Path, metavar="FILE", help="the names of the images to take")
    add("--every", type=int, default=1, metavar="K", help="every K-th image of each class")
    add("--limit", type=int, metavar="N", help="N images in all, evenly from the classes")


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
    if args.shards is not None:
        check_shards(args.shards)
        if args.overwrite:
            raise ConfigError("--overwrite", "no --shards; remove the old files", "both")
    elif not args.dry_run:
        check_out(out, overwrite=args.overwrite)
    chosen = {field.name: getattr(args, field.name) for field in fields(SourceOptions)}
    source = open_source(args.source, SourceOptions(**chosen))

    from irpe_ds.data.beton.convert import convert  # PyTorch and FFCV: seconds
    from irpe_ds.data.beton.forecast import forecast
    from irpe_ds.data.beton.shards import convert_shards

    def announce(listing: "Listing") -> None:
        print_listing(listing, source.kind)

    if args.dry_run:
        coming = forecast(source, out, options, workers=args.workers, announce=announce)
        print_forecast(coming)
        return
    start, how = time.monotonic(), {"workers": args.workers, "on_bad": args.on_bad}
    how |= {"max_bad": args.max_bad, "command": shlex.join(["python", *sys.argv])}
    how["announce"] = announce
    if args.shards is None:
        manifest = convert(source, out, options, overwrite=args.overwrite, **how)
    else:
        manifest = convert_shards(source, out, options, args.shards, **how)
    print_result(manifest, out, time.monotonic() - start)


def print_listing(listing: "Listing", kind: str) -> None:
    """The classes, before the hours of work: whether they are those that were meant."""
    counts = [count for count in listing.counts if count]
    each = f"{min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "")
    print(
        f"{kind}: {sum(counts)} images of {len(counts)} classes, {each} each; "
        f"{listing.left_out} other files left out"
    )
    if len(counts) < len(listing.classes):
        print(f"{len(listing.classes) - len(counts)} more classes have no images")
    rows = list(enumerate(zip(listing.classes, listing.counts, strict=True)))
    shown = rows if len(rows) <= 10 else [*rows[:4], None, *rows[-2:]]
    for row in shown:
        print("  ..." if row is None else _shown(f"  {row[0]}: {row[1][0]}, {row[1][1]} images"))
    for note in listing.notes:
        print(f"note: {note}", flush=True)


def print_forecast(coming: "Forecast") -> None:
    print(
        f"about {_size(coming.size)}, and beside it "
        f"{_size(coming.journal)} until the end, {_size(coming.free)} free; about "
        f"{max(0.1, coming.seconds / 60):.2g} minutes if the disk is fast enough"
    )
    print(
        f"while images are listed, {_size(coming.temporary)} in {temporary_folder()} (TMPDIR), "
        f"{_size(coming.temporary_free)} free"
    )
    if coming.extensions:
        print(f"left out: {_shown(coming.extensions)}")
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
        print(f"not decoded yet: {command('data_prep/verify.py')} {shlex.quote(str(out))}")


if __name__ == "__main__":
    run(main)
