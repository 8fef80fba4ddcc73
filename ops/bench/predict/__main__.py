"""Predict times of the fused kernels, without a GPU: `python -m irpe_ds.ops.bench.predict`.

The kernels are compiled, their machine code is followed instruction by instruction, and a model of
a multiprocessor says how many cycles that takes; beside them PyTorch's FlashAttention-2, which has
no relative position. 256 images of 6 heads, a class token and a grid of patches, bfloat16. Measured
times of FlashAttention-2 and what is predicted of them come last.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError
from irpe_ds.ops.bench.predict import calibration, report
from irpe_ds.ops.bench.predict.gpus import GPUS
from irpe_ds.ops.bench.predict.prediction import Problem
from irpe_ds.ops.bench.predict.report import KERNELS, Case
from irpe_ds.ops.build.toolchain import Unavailable
from irpe_ds.provenance import benchmark_info

DEIT = tuple(Problem(on) for on in ("k", "qkv"))
LARGER = (
    *(Problem("k", (16, 16), head_dim) for head_dim in (80, 96, 128)),
    *(Problem("k", grid) for grid in ((24, 24), (32, 32))),
)
DEFAULT = (
    *(Case(GPUS[name], problem) for name in ("H100", "A100") for problem in (*DEIT, *LARGER)),
    *(Case(GPUS["L40S"], problem) for problem in DEIT),
)
"""What is predicted without options."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, help="default, with --on: H100")
    parser.add_argument("--on", nargs="+", help="where relative position is: k, qkv, ...")
    parser.add_argument("--grid", nargs="+", help="rows and columns of patches: 14x14, ...")
    parser.add_argument("--head-dim", nargs="+", type=int, help="multiples of 8")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--calibrate", action="store_true", help="compare with measurements alone")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.out and not args.out.parent.is_dir():
        raise ConfigError("--out", "a file in a folder that exists", args.out)
    found = benchmark_info("irpe_ds.ops.bench.predict", ("torch", "triton", "nvidia-cuda-nvrtc"))
    found |= {"rows": [], "calibration": []}
    try:
        for case in () if args.calibrate else cases(args):
            row = report.predict(case, args.kernel)
            print(*report.lines(row), sep="\n", flush=True)
            found["rows"].append(row.as_json())
        for comparison in calibration.compare():
            print(report.calibration_line(comparison), flush=True)
            found["calibration"].append(comparison._asdict())
    except Unavailable as error:
        raise ConfigError(f"nothing can be predicted here: {error}") from None
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every combination of what is chosen, or the default."""
    chosen = (args.gpu, args.on, args.grid, args.head_dim)
    if not any(chosen):
        yield from DEFAULT
        return
    gpus, targets = args.gpu or ["H100"], args.on or ["k"]
    grids, head_dims = args.grid or ["14x14"], args.head_dim or [64]
    for gpu, on, grid, head_dim in itertools.product(gpus, targets, grids, head_dims):
        yield Case(GPUS[gpu], Problem(_targets(on), _grid(grid), _head_dim(head_dim)))


def _targets(text: str) -> str:
    if not re.fullmatch(r"q?k?v?", text) or not text:
        raise ConfigError("--on", "a non-empty subset of qkv", text)
    return text


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ConfigError("--grid", "such as 14x14", text)
    return int(found[1]), int(found[2])


def _head_dim(number: int) -> int:
    if number % 8 or not 8 <= number <= 128:
        raise ConfigError("--head-dim", "multiples of 8 up to 128", number)
    return number


if __name__ == "__main__":
    run(main)
