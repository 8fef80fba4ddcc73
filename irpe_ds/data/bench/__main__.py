"""Times conversion and loading side by side with FFCV's and torchvision's, in one run.

    python data_prep/synthetic.py --out data/synthetic
    python -m irpe_ds.data.bench convert --data data/synthetic --workers 2
    python -m irpe_ds.data.bench load --data data/synthetic --workers 1 2
    python -m irpe_ds.data.bench storage --beton /mnt/slow/train.beton --workers 2

--data is a folder whose folder/train is an ImageFolder without damaged files, --beton a file on the
storage that is to be measured. Every round runs each candidate once, in rotated order. Prints
images per second and their ratios within a round, as medians over the rounds.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from irpe_ds.cli import run
from irpe_ds.data.bench.loaders import LOADERS, LoaderSpec, started
from irpe_ds.data.bench.storage import STORAGE
from irpe_ds.data.beton.options import Mode
from irpe_ds.errors import ConfigError
from irpe_ds.files import fsync
from irpe_ds.provenance import benchmark_info

# Nothing imported above starts threads: the candidates do, each in its own process.

ROOT = Path(__file__).parents[3]  # of the repository, for its scripts
PACKAGES = ("torch", "torchvision", "ffcv", "numba", "numpy", "pillow")
WHOLE = "convert, whole process until the file is on the disk"
PER_CPU = "per second of CPU time"  # little affected by other programs on the machine
INSIDE = "convert, without start-up, as each reports it"

Result = TypeVar("Result")


class Table(NamedTuple):
    """Rates of some candidates."""

    title: str
    rates: Mapping[str, list[float]]
    """Images per second of each candidate, by round."""
    references: Sequence[str]
    """The candidates that all are compared with."""


LOAD_REFERENCES = ("ffcv", "decode only", "ours, normalised")


def bench_load(args: argparse.Namespace) -> Iterator[Table]:
    """Images per second of an epoch after a warm-up epoch, two tables per number of workers."""
    folder = args.data / "folder/train"
    with tempfile.TemporaryDirectory(dir=args.data) as scratch:
        beton = Path(scratch, "train.beton")
        _run([*_converter(folder, beton, max(args.workers)), "--mode", args.mode])
        for workers in args.workers:
            spec = LoaderSpec(
                folder=folder, beton=beton, workers=workers, size=args.size, batch=args.batch
            )
            title = f"load, workers {workers}, {args.size} pixels, batches of {args.batch}"
            title += f", {args.mode}" if args.mode != "passthrough" else ""
            with ExitStack() as stack:
                calls = {
                    name: stack.enter_context(started(name, prepare, spec))
                    for name, prepare in LOADERS.items()
                }
                results = _interleave(calls, args.rounds)
            yield from _tables((title, f"{title}, {PER_CPU}"), results, LOAD_REFERENCES)


def bench_storage(args: argparse.Namespace) -> Iterator[Table]:
    """Images per second of an epoch that begins with a cold cache, for each number of workers."""
    for workers in args.workers:
        spec = LoaderSpec(
            folder=args.beton.parent,
            beton=args.beton,
            workers=workers,
            size=args.size,
            batch=args.batch,
            window=args.window,
        )
        title = f"storage, workers {workers}, {args.size} pixels, window {args.window}"
        rates: dict[str, list[tuple[float, float]]] = {}
        for name in args.loaders:  # one process after the other: each needs memory
            with started(name, STORAGE[name], spec) as call:
                rates[name] = [call() for _ in range(args.rounds)]
        yield from _tables((title, f"{title}, {PER_CPU}"), rates, args.loaders[:1])


def bench_convert(args: argparse.Namespace) -> Iterator[Table]:
    """Images per second of a conversion, with and without start-up."""
    folder, (workers,) = args.data / "folder/train", args.workers
    calls = {
        "ours": lambda out: _conversion(_converter(folder, out, workers), out),
        "ours, --check header": lambda out: _conversion(
            [*_converter(folder, out, workers), "--check", "header"], out
        ),
        "ffcv-imagenet": lambda out: _conversion(_recipe(folder, out, workers), out),
        "disk": lambda out: _copy(folder, out),
    }

    def rates(name: str) -> tuple[float, float]:
        with tempfile.TemporaryDirectory(dir=args.data) as scratch:
            start = time.perf_counter()
            inside = calls[name](Path(scratch, "train.beton"))
            whole = len(_files(folder)) / (time.perf_counter() - start)
        return whole, inside or whole

    rates("disk")  # puts the files into the page cache, for all candidates
    results = _interleave({name: partial(rates, name) for name in calls}, args.rounds)
    titles = [f"{title}, workers {workers}" for title in (WHOLE, INSIDE)]
    yield from _tables(titles, results, ("ffcv-imagenet", "disk"))


def _tables(
    titles: Sequence[str],
    results: Mapping[str, list[tuple[float, float]]],
    references: Sequence[str],
) -> Iterator[Table]:
    """A table of the first rates of all results, and one of the second."""
    for part, title in enumerate(titles):
        own = {name: [result[part] for result in rounds] for name, rounds in results.items()}
        yield Table(title, own, references)


def _converter(folder: Path, out: Path, workers: int) -> list[str]:
    """The command of our conversion."""
    command = [
        sys.executable,
        os.fspath(ROOT / "data_prep/convert.py"),
        "--source",
        os.fspath(folder),
    ]
    return [*command, "--out", os.fspath(out), "--workers", str(workers)]


def _recipe(folder: Path, out: Path, workers: int) -> list[str]:
    """The command of ffcv-imagenet's conversion, in this script."""
    command = [sys.executable, "-m", "irpe_ds.data.bench", "recipe", "--source"]
    return [*command, os.fspath(folder), "--out", os.fspath(out), "--workers", str(workers)]


def _conversion(command: Sequence[str], out: Path) -> float:
    """Convert, fsync the file and return the images per second that were printed."""
    printed = re.findall(r"([\d.]+) img/s", _run(command))
    fsync(out)
    return float(printed[-1])


def _copy(folder: Path, out: Path) -> None:
    """Concatenate the files into `out` and fsync it."""
    with out.open("wb") as file:
        for path in _files(folder):
            file.write(path.read_bytes())
    fsync(out)


def convert_as_the_recipe(args: argparse.Namespace) -> None:
    """Write a .beton file as ffcv-imagenet does for its results: JPEGs of up to 500 pixels."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    image = RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90)
    folder = ImageFolder(args.source)
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(os.fspath(args.out), fields, num_workers=args.workers)
    start = time.perf_counter()
    writer.from_indexed_dataset(folder, chunksize=100)
    print(f"{len(folder) / (time.perf_counter() - start):.1f} img/s")


def _run(command: Sequence[str]) -> str:
    """The output of a command, which must succeed."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {process.stderr}")
    return process.stdout


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def _interleave(calls: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Results of each call by round; the first call of a round rotates."""
    names = list(calls)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for done in range(rounds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(calls[name]())
    return results


def _summary(table: Table) -> dict[str, dict[str, Any]]:
    """Medians and ratios of a table, as in the report."""
    rows: dict[str, dict[str, Any]] = {}
    for name, own in table.rates.items():
        ratios = {
            other: statistics.median(a / b for a, b in zip(own, table.rates[other], strict=True))
            for other in table.references
        }
        rows[name] = {"median": statistics.median(own), "rates": own, "ratios": ratios}
    return rows


def _print(title: str, references: Sequence[str], rows: Mapping[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':24} {'img/s':>9}", *(f"{f'/ {name}':>18}" for name in references))
    for name, row in rows.items():
        ratios = (f"{ratio:18.3f}" for ratio in row["ratios"].values())
        print(f"{name:24} {row['median']:9.0f}", *ratios, flush=True)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for mistakes that would fail minutes later."""
    cores, images = len(os.sched_getaffinity(0)), len(_images(args))
    if not all(1 <= workers <= cores for workers in args.workers):
        raise ConfigError("--workers", f"1 to {cores}, the cores", args.workers)
    if args.rounds < 1:
        raise ConfigError("--rounds", "at least 1", args.rounds)
    if args.part != "convert" and not 1 <= args.batch <= images:
        raise ConfigError("--batch", f"1 to {images}, the number of images", args.batch)
    if args.out and not args.out.parent.is_dir():
        raise ConfigError("--out", "a file in an existing folder", args.out)


def _images(args: argparse.Namespace) -> list[int]:
    """Bytes of every image that is converted or loaded."""
    if args.part == "storage":
        from irpe_ds.data.beton.reader import read_beton

        return read_beton(args.beton, "--beton").entries["bytes"].tolist()
    found = [path.stat().st_size for path in _files(args.data / "folder/train")]
    if not found:
        raise ConfigError("--data", "a folder with folder/train, an ImageFolder", args.data)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    data = "--data", "folder with folder/train"
    for name, workers, text, (option, meaning) in (
        ("convert", 1, "ImageFolder to .beton; limit: copying the bytes", data),
        ("load", "+", "training batches; limit: decoding the JPEGs", data),
        ("storage", "+", "from a cold cache; limit: reading the file", ("--beton", "file to read")),
    ):
        part = parts.add_parser(name, help=text)
        part.add_argument(option, type=Path, required=True, help=meaning)
        part.add_argument("--workers", type=int, nargs=workers, default=[1])
        part.add_argument("--rounds", type=int, default=5)
        part.add_argument("--out", type=Path, help="JSON file to write")
        if name != "convert":
            part.add_argument("--size", type=int, default=224, help="of the images, pixels")
            part.add_argument("--batch", type=int, default=128, help="images")
        if name == "load":
            text = "how the images are stored"
            part.add_argument("--mode", choices=get_args(Mode), default="passthrough", help=text)
    text = f"which, of {', '.join(STORAGE)}; compared with the first"
    part.add_argument(
        "--loaders", nargs="+", choices=STORAGE, default=[*STORAGE], metavar="NAME", help=text
    )
    part.add_argument("--window", type=int, default=2048, help="images that `blocks` mixes")
    part.add_argument("--about", help="what storage this is, for the report")
    part = parts.add_parser("recipe", help="only ffcv-imagenet's conversion")
    part.add_argument("--source", type=Path, required=True, help="folder of class folders")
    part.add_argument("--out", type=Path, required=True, help="the .beton file to write")
    part.add_argument("--workers", type=int, default=1)
    return parser


def main() -> None:
    args = _parser().parse_args()
    if args.part == "recipe":
        convert_as_the_recipe(args)
        return
    check(args)
    images = _images(args)
    report = benchmark_info("irpe_ds.data.bench", PACKAGES)
    report |= {
        "rounds": args.rounds,
        "images": len(images),
        "bytes_per_image": round(statistics.mean(images)),
    }
    if args.part == "storage":
        report["storage"] = args.about
    for name, value in report.items():
        print(f"{name}: {value}")
    report["tables"] = {}
    parts = {"convert": bench_convert, "load": bench_load, "storage": bench_storage}
    for table in parts[args.part](args):
        rows = report["tables"][table.title] = _summary(table)
        _print(table.title, table.references, rows)
        if args.out:  # after every table: a run that is cut short keeps what it has
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
