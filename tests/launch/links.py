"""How long an update takes over links of several rates, measured, and planned from one of them.

    python -m tests.launch.links --rates 200Mbit/s 50Mbit/s 1000Mbit/s --out results.json

Two hosts that are network namespaces of this machine run launch/configs/scaling/links.yaml at every
rate; the planner is calibrated with what the first rate gives. Needs what tests/launch/hosts.py
needs and data/digits (`make quickstart`).
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from irpe_ds.benchmark.experiment import load_experiment
from irpe_ds.benchmark.rows import RESULTS
from irpe_ds.cli import run
from irpe_ds.errors import ConfigError
from irpe_ds.planner.assumptions import Assumptions
from irpe_ds.planner.calibrate import Result, calibrate, planned_seconds, read_results
from irpe_ds.planner.hardware import build_cluster, find_gpu
from irpe_ds.planner.plan import Scenario
from irpe_ds.planner.profile import profile
from irpe_ds.planner.zero import read_zero
from tests.launch.hosts import Hosts, missing, python_environment

EXPERIMENT = "launch/configs/scaling/links.yaml"
CORE = "core:peak_tflops=0.1,memory_gib=4,memory_gb_s=10"
"""A start for the calibration, which fits both speeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", required=True, help="the first one calibrates")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    args = parser.parse_args()
    reason = missing()
    if reason is not None:
        raise ConfigError("this machine", "one that can have hosts", reason)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        files = {rate: measure(rate, Path(folder)) for rate in args.rates}
        rows = compare(files)
        facts = json.loads(files[args.rates[0]].read_text())["rows"][-1]
    keys = ("device", "torch", "deepspeed_version", "commit")
    report = {"command": sys.argv[1:], **{key: facts[key] for key in keys}, "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(rate: str, folder: Path) -> Path:
    """Run the experiment over links of this rate; its results."""
    name = rate.replace("/", "-")
    overrides = [f"output={folder}", f"name={name}", f"scaling.network={rate}"]
    with Hosts(folder / f"hosts-{name}", 2, python_environment()) as hosts:
        hosts.shape(rate.removesuffix("/s"))
        overrides.append(f"scaling.hostfile={hosts.hostfile(hosts.names)}")
        command = [sys.executable, "launch/scaling.py", "--config", EXPERIMENT, *overrides]
        log = folder / f"{name}.log"
        if hosts.start(command, log).wait():
            raise RuntimeError(log.read_text())
    print(log.read_text())
    return folder / name / RESULTS


def compare(files: dict[str, Path]) -> list[dict[str, Any]]:
    """Times measured and planned at every rate; prints them."""
    config = load_experiment(Path(EXPERIMENT), ["scaling.matrix=[{}]"]).config
    zeros = {
        name: read_zero(Path(f"ds_configs/{name}.json")) for name in ("zero1", "zero2", "zero3")
    }
    first, *_ = files
    cluster = build_cluster(find_gpu(CORE), 2, 1, "10GB/s", first, backend="gloo")
    counted = profile(config)
    scenario = Scenario(config=config, profile=counted, zero=zeros["zero1"], assumed=Assumptions())

    def results(path: Path) -> list[Result]:
        return read_results(path, config.model.name, config.train.precision, "k")

    found = calibrate(scenario, cluster, results(files[first]), zeros)
    fitted = replace(scenario, assumed=found.assumed)
    rows = []
    for rate, path in files.items():
        for result in results(path):
            planned = planned_seconds(fitted, cluster, result, zeros)
            measured = result.seconds
            row = {"rate": rate, "hosts": result.nodes, "stage": result.stage}
            row |= {"measured_ms": 1e3 * measured, "planned_ms": 1e3 * planned}
            print(
                f"{rate}, {result.nodes} hosts, stage {result.stage}: {1e3 * measured:.1f} ms, "
                f"planned {1e3 * planned:.1f} ms ({100 * (planned / measured - 1):+.1f} %)"
            )
            rows.append(row)
    return rows


if __name__ == "__main__":
    run(main)
