"""Time the operators on this machine, side by side in one run: `python -m irpe_ds.ops.bench`.

Prints tables and writes them as JSON: the gather alone, the attention op, and a training step of
a DeiT. Times are medians in milliseconds; ratios are to the fastest baseline of the same rounds.
With --upstream the released op is timed too.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError
from irpe_ds.ops import dispatch
from irpe_ds.ops.bench import cases, upstream
from irpe_ds.ops.bench.timing import compare
from irpe_ds.provenance import benchmark_info

PARTS = ("gather", "attention", "step")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "dtype": "bfloat16",
        "batch": 256,
        "models": [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")],
        "attention": [(256, 6, 14), (32, 12, 24), (16, 12, 32)],
    },
    "cpu": {
        "dtype": "float32",
        "batch": 8,
        "models": ["deit_small_patch16_224"],
        "attention": [(8, 6, 14)],
    },
}
"""Defaults of options, by device."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on the CPU")
    parser.add_argument("--models", nargs="+", help="timm's DeiTs to time a step of")
    parser.add_argument("--batch", type=int, help="images of a step; default: 256, 8 on the CPU")
    parser.add_argument("--lookups", type=int, nargs=2, default=(64, 6), metavar=("B", "H"))
    parser.add_argument(
        "--attention",
        type=int,
        nargs=3,
        action="append",
        metavar=("B", "H", "SIDE"),
        help="images, heads, and patches along a side; may be repeated",
    )
    parser.add_argument(
        "--encodings", nargs="+", default=cases.ENCODINGS, help="encodings to time attention with"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time steps under torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--upstream", type=Path, help="folder rpe_ops of the released project")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    for option, value in DEFAULTS[args.device].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    check(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    if args.upstream:
        run_released = upstream.attention(upstream.load(args.upstream))
        row = dispatch.Implementation(run_released, unsupported_reason=upstream.unsupported_reason)
        dispatch.IMPLEMENTATIONS["upstream"] = row
    report = benchmark_info("irpe_ds.ops.bench", ("torch", "timm"))
    if args.device == "cuda":
        report["device"] = torch.cuda.get_device_name()
    report |= {"threads": args.threads, "rounds": args.rounds, "tables": {}}
    for title, calls, baselines in comparisons(args):
        timings = compare(calls, baselines, args.rounds)
        print(f"\n{title}\n{'':24} {'ms':>9}  ratio {'MiB':>9}")
        for name, timing in timings.items():
            peak = "" if timing.peak is None else f"{timing.peak:9.1f}"
            print(f"{name:24} {timing.median:9.3f} {timing.ratio:6.3f} {peak}", flush=True)
        report["tables"][title] = {name: timing._asdict() for name, timing in timings.items()}
        if args.out:  # after every table, so that an interrupted run keeps its results
            args.out.write_text(json.dumps(report, indent=2) + "\n")


def comparisons(args: argparse.Namespace) -> Iterator[cases.Comparison]:
    """What to time, one table after another."""
    dtype, parts = getattr(torch, args.dtype), args.parts or PARTS
    if "gather" in parts:
        released = upstream.load(args.upstream) if args.upstream else None
        yield from cases.gather(args.device, dtype, args.lookups[0], args.lookups[1], released)
    if "attention" in parts:
        for batch, heads, side in args.attention:
            for encoding in args.encodings:
                yield from cases.attention(args.device, dtype, batch, heads, side, encoding)
    if "step" in parts:
        for model in args.models:
            yield cases.training_step(args.device, dtype, model, args.batch, compiled=args.compile)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError now for what would otherwise fail after minutes of timing."""
    for given, known, where in (
        (args.parts, PARTS, "parts"),
        (args.encodings, cases.ENCODINGS, "--encodings"),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(where, f"some of {', '.join(known)}", ", ".join(unknown))
    if args.rounds < 1:
        raise ConfigError("--rounds", "at least 1", args.rounds)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cpu, as PyTorch finds no GPU", args.device)
    for model in args.models:
        if not timm.is_model(model):
            raise ConfigError("--models", "DeiTs of timm", model)
    if args.out and not args.out.parent.is_dir():
        raise ConfigError("--out", "a file in a folder that exists", args.out)


if __name__ == "__main__":
    run(main)
