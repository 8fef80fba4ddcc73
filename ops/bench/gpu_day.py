"""Everything that is to be measured on a GPU, by one command: `make gpu-day`.

Runs the tests that need a GPU, the benchmark, and compute-sanitizer over the fused kernels; times
each of these, beside its prediction. Then says which of the bars are reached, and exits with 1
unless all are. Everything is written to one JSON file, after every part.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError
from irpe_ds.ops import fused
from irpe_ds.ops.bench import cases
from irpe_ds.provenance import benchmark_info

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (256, 6, 14)
"""Images, heads, and patches along a side, of what is timed: DeiT-S."""
BENCHMARK = {
    "cuda": f"--attention {' '.join(map(str, SHAPE))} --models deit_small_patch16_224",
    "cpu": "--device cpu --attention 1 2 3 --encodings K --models deit_tiny_patch16_224"
    " --batch 1 --rounds 1",
}
"""Options of irpe_ds.ops.bench, by device; on the CPU to try this file."""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
SANITIZED = ["tests/ops/test_fused.py", "-k", "not (last_image or same_bits)"]
"""Tests under compute-sanitizer, without those of large batches: it is a hundred times slower."""


class Bar(NamedTuple):
    """How long `fused` may take, as a share of a baseline's time."""

    encoding: str
    baseline: str
    at_most: float

    @property
    def text(self) -> str:
        return f"{self.encoding}: at most {self.at_most:g} x {self.baseline}"


BARS = (
    Bar("K", "SDPA, flash", 0.95),
    Bar("K", "SDPA, cuDNN", 1.1),
    Bar("QKV", "SDPA, flash", 1.2),
    Bar("K", "upstream", 1 / 8),
    Bar("QKV", "upstream", 1 / 8),
    Bar("K", "flex", 1 / 2),
)
"""Of attention, forward + backward."""
TESTS = {
    "the same bits on repeated runs": "test_repeated_runs_give_the_same_bits",
    "1,000 steps of training like the reference": "test_training_goes_the_way_of_the_reference",
}
"""Bars that are tests, by their names."""


class Verdict(NamedTuple):
    """What became of a bar."""

    text: str
    found: str
    reached: bool | None
    """None where it was not measured."""


MARKS = {True: "reached", False: "MISSED", None: ""}


def verdicts(report: Mapping[str, Any]) -> Iterator[Verdict]:
    """Every bar, from what the parts wrote."""
    for bar in BARS:
        rows: dict[str, Any] = {}
        for title, table in report.get("benchmark", {}).items():
            is_whole = title.endswith(", forward + backward")
            if title.startswith(f"attention, {bar.encoding}, ") and is_whole:
                rows = table
        if "fused" in rows and bar.baseline in rows:
            ratio = rows["fused"]["median"] / rows[bar.baseline]["median"]
            yield Verdict(bar.text, f"{ratio:.3f}", ratio <= bar.at_most)
        else:
            yield Verdict(bar.text, "not measured", None)
    tests = {name: of for name, of in report.get("tests", {}).items() if of != "skipped"}
    for text, test in TESTS.items():
        found = {of for name, of in tests.items() if test in name}
        reached = found == {"passed"} if found else None
        yield Verdict(text, ", ".join(sorted(found)) or "not measured", reached)
    failed = sum(of == "failed" for of in tests.values())
    reached = not failed if tests else None
    yield Verdict("make test-gpu", f"{failed} of {len(tests)} failed", reached)
    for tool, code in report.get("sanitizer", {}).items():
        yield Verdict(f"compute-sanitizer {tool}", f"exit code {code}", code == 0)
    for part, error in report.get("errors", {}).items():
        yield Verdict(part, error, False)


def run_tests(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Outcome of each test of `make test-gpu`."""
    path = folder / "tests.xml"
    subprocess.run([*PYTEST, "--durations=10", f"--junitxml={path}"], cwd=ROOT, check=False)
    return outcomes(path.read_text())


def outcomes(junit: str) -> dict[str, str]:
    """passed, failed or skipped, by test, from pytest's JUnit XML."""
    names = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (names[child.tag] for child in case if child.tag in names), "passed"
        )
        for case in ElementTree.fromstring(junit).iter("testcase")
    }


def run_sanitizer(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Exit code of each tool over the fused kernels; nothing where it is not installed."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH: skipped")
        return {}
    kernels = ["--kernel-name", "kns=attention_", "--error-exitcode", "99"]
    codes = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, *kernels, *PYTEST, *SANITIZED]
        codes[tool] = subprocess.run(command, cwd=ROOT, check=False).returncode
    return codes


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The tables of irpe_ds.ops.bench."""
    options = ["attention", "step", *BENCHMARK[args.device].split()]
    if args.upstream:
        options += ["--upstream", str(args.upstream)]
    return _written_by("irpe_ds.ops.bench", options, folder / "benchmark.json")["tables"]


def time_kernels(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Median microseconds of each fused kernel, by encoding; nothing on the CPU."""
    if args.device == "cpu":
        return {}
    batch, heads, side = SHAPE
    times = {}
    for encoding in ("K", "QKV"):
        shape = (batch, heads, side**2 + 1, 64)
        x = cases.random_inputs("cuda", torch.bfloat16, shape, side, cases.ENCODINGS[encoding])
        grad = torch.randn_like(x.q)
        fused.attention(x).backward(grad)  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(20):
                fused.attention(x).backward(grad)
            torch.cuda.synchronize()
        times[encoding] = medians(profiler.events())
    return times


def medians(events: Iterable[Any]) -> dict[str, float]:
    """Median microseconds of the fused kernels among a profiler's events."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event.name.startswith("attention_"):
            name = event.name.removeprefix("attention_")
            times.setdefault(name, []).append(event.time_range.elapsed_us())
    return {name: statistics.median(of) for name, of in times.items()}


def run_predictor(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is predicted of the same kernels on an H100; nothing on the CPU."""
    if args.device == "cpu":
        return {}
    options = ["--gpu", "H100", "--on", "k", "qkv"]
    return _written_by("irpe_ds.ops.bench.predict", options, folder / "predicted.json")


def _written_by(module: str, options: list[str], path: Path) -> dict[str, Any]:
    """The JSON file of a module, as far as it came."""
    command = [sys.executable, "-m", module, *options, "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=False)
    return json.loads(path.read_text())


PARTS: dict[str, Callable[[argparse.Namespace, Path], Mapping[str, Any]]] = {
    "tests": run_tests,
    "benchmark": run_benchmark,
    "kernels": time_kernels,
    "sanitizer": run_sanitizer,
    "predicted": run_predictor,
}


def gpu_info() -> dict[str, str]:
    """Name and driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    drivers = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return {"device": torch.cuda.get_device_name(), "driver": drivers[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=BENCHMARK, default="cuda", help="cpu: to try this out")
    parser.add_argument("--upstream", type=Path, help="folder rpe_ops of the released project")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; default: in ops/bench/results"
    )
    args = parser.parse_args()
    report = benchmark_info("irpe_ds.ops.bench.gpu_day", ("torch", "timm"))
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device", "cpu, as PyTorch finds no GPU", args.device)
        report |= gpu_info()
    stem = f"gpu_day-{report['device']}-{time.strftime('%Y-%m-%d')}".replace(" ", "_")
    out = args.out or ROOT / f"ops/bench/results/{stem}.json"
    with TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            print(f"==> {name}", flush=True)
            try:
                report[name] = part(args, Path(folder))
            except Exception as error:  # it takes no other part with it
                report.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
            out.write_text(json.dumps(report, indent=2) + "\n")
    results = list(verdicts(report))
    for text, found, reached in results:
        print(f"{MARKS[reached]:8} {text}: {found}")
    print(f"written to {out}")
    sys.exit(not all(each.reached for each in results))


if __name__ == "__main__":
    run(main)
