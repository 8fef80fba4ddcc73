"""Fits what no count gives, the shares that are achieved, to a scaling experiment's results."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from irpe_ds.errors import ConfigError
from irpe_ds.scaling.hardware import Cluster
from irpe_ds.scaling.planner import Scenario
from irpe_ds.scaling.step import Assumptions, step
from irpe_ds.scaling.zero import Zero

COLUMNS = ("model", "ranks", "nodes", "stage", "micro_batch", "images_per_s")
"""What a row must have; `accumulation` is 1 and `precision` the plan's where it has none."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured run."""

    ranks: int
    nodes: int
    stage: int
    micro_batch: int
    accumulation: int
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Shares that were fitted, and how well the results then agree."""

    assumed: Assumptions
    results: int
    """Rows that it was fitted to."""
    worst: float
    """Largest relative difference of a step's time."""


def read_results(path: Path, model: str, precision: str) -> list[Result]:
    """The rows of a CSV, or of a JSON list, that are about this model in this precision.

    Rows without a speed are runs that failed; they are left out.

    Raises:
        ConfigError: the file cannot be read, lacks a column, or has no such row.
    """
    try:
        text = path.read_text()
        is_json = path.suffix == ".json"
        rows = json.loads(text) if is_json else list(csv.DictReader(io.StringIO(text)))
    except OSError as error:
        got = f"{path}: {error.strerror}"
        raise ConfigError("--calibrate", "a readable CSV or JSON", got) from None
    except ValueError as error:
        raise ConfigError(path, "valid JSON", error) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(path, "a list of rows", type(rows).__name__)
    found = []
    for number, row in enumerate(rows, 1):
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            expected = f"the columns {', '.join(COLUMNS)}"
            raise ConfigError(f"{path}, row {number}", expected, f"none named {missing[0]}")
        same = row["model"] == model and row.get("precision", precision) == precision
        if same and row["images_per_s"] not in ("", None):
            found.append(_result(row, f"{path}, row {number}"))
    if not found:
        got = f"none among {len(rows)}"
        raise ConfigError(path, f"results of {model} in {precision}", got)
    return found


def _result(row: Mapping[str, Any], where: str) -> Result:
    names = ("ranks", "nodes", "stage", "micro_batch")
    try:
        counts = {name: int(row[name]) for name in names}
        accumulation, speed = int(row.get("accumulation") or 1), float(row["images_per_s"])
    except (TypeError, ValueError) as error:
        raise ConfigError(where, "numbers", error) from None
    result = Result(**counts, accumulation=accumulation, images_per_s=speed)
    sensible = min(result.ranks, result.nodes, result.micro_batch, accumulation) > 0 and speed > 0
    if not sensible or result.ranks % result.nodes or result.stage not in (0, 1, 2, 3):
        raise ConfigError(where, "positive numbers, whole nodes, a stage from 0 to 3", dict(row))
    return result


def calibrate(
    scenario: Scenario, cluster: Cluster, results: Sequence[Result], zeros: Mapping[int, Zero]
) -> Calibration:
    """Fit the speed of the GPU, and that of the links where several ranks were measured.

    Least squares of the logarithm of the time of a step. Both shares of the GPU, of its products
    and of its memory, move together.

    Args:
        zeros: the settings that each stage was measured with.

    Raises:
        ConfigError: a result of a stage that there are no settings of.
    """
    for result in results:
        if result.stage not in zeros:
            raise ConfigError("--calibrate", f"results of stages {sorted(zeros)}", result.stage)
    several = any(result.ranks > 1 for result in results) and len(results) > 1

    def differences(logs: np.ndarray) -> np.ndarray:
        assumed = _scaled(scenario.assumed, logs)
        return np.array(
            [
                math.log(_seconds(scenario, cluster, result, zeros, assumed))
                - math.log(_images(result) / result.images_per_s)
                for result in results
            ]
        )

    logs, sensitive = _least_squares(differences, 2 if several else 1)
    fitted = ["flop_share", "memory_share"] + (["link_share"] if len(sensitive) > 1 else [])
    worst = float(np.abs(np.expm1(differences(logs))).max())
    assumed = replace(_scaled(scenario.assumed, logs), fitted=tuple(fitted))
    return Calibration(assumed=assumed, results=len(results), worst=worst)


def _images(result: Result) -> int:
    return result.micro_batch * result.accumulation * result.ranks


def _scaled(assumed: Assumptions, logs: np.ndarray) -> Assumptions:
    factors = np.exp(np.append(logs, np.zeros(2 - len(logs))))
    return replace(
        assumed,
        flop_share=assumed.flop_share * factors[0],
        memory_share=assumed.memory_share * factors[0],
        link_share=assumed.link_share * factors[1],
    )


def _seconds(
    scenario: Scenario,
    cluster: Cluster,
    result: Result,
    zeros: Mapping[int, Zero],
    assumed: Assumptions,
) -> float:
    per_node = result.ranks // result.nodes
    # The network cards of a node stay what they are, however many of its GPUs take part.
    measured = replace(cluster, gpus=result.ranks, per_node=per_node)
    shape = (result.micro_batch, result.accumulation)
    zero = zeros[result.stage]
    return step(scenario.profile, zero, measured, scenario.config, *shape, assumed).total


def _least_squares(function: Any, unknowns: int) -> tuple[np.ndarray, list[int]]:
    """Gauss-Newton with halved steps; the unknowns, and which of them matter at all."""
    x, small = np.zeros(unknowns), 1e-4
    sensitive = list(range(unknowns))
    for _ in range(50):
        here = function(x)
        columns = [(function(x + small * unit) - here) / small for unit in np.eye(unknowns)]
        sensitive = [n for n in range(unknowns) if np.abs(columns[n]).max() > 1e-3]
        if not sensitive:
            break
        jacobian = np.stack([columns[n] for n in sensitive], 1)
        change = np.zeros(unknowns)
        change[sensitive] = np.linalg.lstsq(jacobian, -here, rcond=1e-6)[0]
        change = np.clip(change, -2, 2)
        while np.abs(change).max() > 1e-9 and _norm(function(x + change)) > _norm(here):
            change = change / 2
        x = x + change
        if np.abs(change).max() < 1e-9:
            break
    return x, sensitive


def _norm(values: np.ndarray) -> float:
    return float(np.square(values).sum())
