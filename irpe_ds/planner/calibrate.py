"""Fits what no count gives, the shares that are achieved, to a scaling experiment's results."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from irpe_ds.errors import ConfigError
from irpe_ds.planner.hardware import Cluster, parse_rate
from irpe_ds.planner.plan import Scenario
from irpe_ds.planner.step import Assumptions, step
from irpe_ds.planner.zero import Zero

COLUMNS = ("model", "ranks", "nodes", "stage", "micro_batch", "images_per_s")
"""What a row must have; without the others `accumulation` is 1, the rest as the plan has it."""

KNOWN_AXES = {
    *("nodes", "ranks_per_node", "micro_batch", "model.name", "model.rpe"),
    *(f"train.{key}" for key in ("global_batch", "accumulation", "precision", "deepspeed")),
}
"""What runs of an experiment may differ in for the plan to know of it; others are left out."""

UNKNOWNS = (("flop_share", "memory_share"), ("link_share",), ("hook_us",), ("latency",))
"""What may be fitted, the most important first; what stands together moves together."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured run."""

    ranks: int
    nodes: int
    stage: int
    micro_batch: int
    accumulation: int
    images_per_s: float
    network: float | None = None
    """Rate of a network card, bytes per second. None: as the plan has it."""
    file: str | None = None
    """Name of the ZeRO settings. None: those of the stage."""

    @property
    def seconds(self) -> float:
        """Of an update."""
        return self.micro_batch * self.accumulation * self.ranks / self.images_per_s


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Shares that were fitted, and how well the results then agree."""

    assumed: Assumptions
    results: int
    """Rows that it was fitted to."""
    worst: float
    """Largest relative difference of a step's time."""


def read_results(
    path: Path,
    model: str,
    precision: str,
    rpe: str = "",
    shape: Mapping[str, Any] | None = None,
) -> list[Result]:
    """The rows of a CSV, or of a JSON, that are about this model in this precision.

    The files of `launch/scaling.py`, or lists of rows with COLUMNS; `rpe` is what `model.rpe` puts
    relative position on, `shape` what else of the section `model` must be as in the experiment,
    which a JSON tells and a CSV does not.

    Rows without a speed are runs that failed; they are left out, as are runs that differ from the
    others in what the plan does not tell apart.

    Raises:
        ConfigError: the file cannot be read, lacks a column, has no such row, or another shape.
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
    if isinstance(rows, dict):
        measured = rows.get("settings", {}).get("model", {})
        for key, value in (shape or {}).items():
            if measured.get(key, value) != value:
                raise ConfigError(f"{path}: model.{key}", value, measured[key])
        rows = rows.get("rows", rows)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(path, "a list of rows", type(rows).__name__)
    found = []
    for number, row in enumerate(rows, 1):
        if "error" in row and row.get("images_per_s") in ("", None):
            continue
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            expected = f"the columns {', '.join(COLUMNS)}"
            raise ConfigError(f"{path}, row {number}", expected, f"none named {missing[0]}")
        wanted = {"model": model, "precision": precision, "rpe": rpe}
        same = all(row.get(key, value) == value for key, value in wanted.items())
        axes = row.get("axes") or {}
        axes = json.loads(axes) if isinstance(axes, str) else axes
        same = same and axes.keys() <= KNOWN_AXES
        if same and row.get("images_per_s") not in ("", None):
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
    network = row.get("network") or None
    rate = None if network is None else parse_rate(f"{where}: network", network)
    result = Result(
        **counts,
        accumulation=accumulation,
        images_per_s=speed,
        network=rate,
        file=row.get("deepspeed") or None,
    )
    sensible = min(result.ranks, result.nodes, result.micro_batch, accumulation) > 0 and speed > 0
    if not sensible or result.ranks % result.nodes or result.stage not in (0, 1, 2, 3):
        raise ConfigError(where, "positive numbers, whole nodes, a stage from 0 to 3", dict(row))
    return result


def calibrate(
    scenario: Scenario, cluster: Cluster, results: Sequence[Result], zeros: Mapping[int | str, Zero]
) -> Calibration:
    """Fit what the results depend on, of UNKNOWNS the first as many as there are different runs.

    Least squares of the logarithm of the time of a step.

    Args:
        zeros: the settings that results were measured with, by name or else by stage.

    Raises:
        ConfigError: a result with settings that are not among them.
    """
    for result in results:
        if _settings_of(result) not in zeros:
            expected = f"results of {', '.join(map(str, zeros))}"
            raise ConfigError("--calibrate", expected, result.file or f"stage {result.stage}")

    def differences(logs: np.ndarray) -> np.ndarray:
        assumed = _scaled(scenario.assumed, logs)
        return np.array(
            [
                math.log(seconds(scenario, cluster, result, zeros, assumed))
                - math.log(result.seconds)
                for result in results
            ]
        )

    runs = {replace(result, images_per_s=1.0) for result in results}
    slopes = _slopes(differences, np.zeros(len(UNKNOWNS)), range(len(UNKNOWNS)))
    matter = [n for n, slope in enumerate(slopes.T) if np.abs(slope).max() > 1e-3]
    matter = matter[: len(runs)]
    logs = _least_squares(differences, matter)
    fitted = tuple(name for n in matter for name in UNKNOWNS[n])
    worst = float(np.abs(np.expm1(differences(logs))).max())
    assumed = replace(_scaled(scenario.assumed, logs), fitted=fitted)
    return Calibration(assumed=assumed, results=len(results), worst=worst)


def _scaled(assumed: Assumptions, logs: np.ndarray) -> Assumptions:
    factors = {
        name: float(factor)
        for names, factor in zip(UNKNOWNS, np.exp(logs), strict=True)
        for name in names
    }
    return replace(assumed, **{name: getattr(assumed, name) * x for name, x in factors.items()})


def _settings_of(result: Result) -> int | str:
    return result.stage if result.file is None else result.file


def seconds(
    scenario: Scenario,
    cluster: Cluster,
    result: Result,
    zeros: Mapping[int | str, Zero],
    assumed: Assumptions,
) -> float:
    """What an update of a result's run is planned to take."""
    per_node = result.ranks // result.nodes
    # The network cards of a node stay what they are, however many of its GPUs take part.
    measured = replace(cluster, gpus=result.ranks, per_node=per_node)
    if result.network is not None:
        measured = replace(measured, inter=result.network * cluster.nics)
    shape = (result.micro_batch, result.accumulation)
    zero = zeros[_settings_of(result)]
    return step(scenario.profile, zero, measured, scenario.config, *shape, assumed).total


def _slopes(function: Any, x: np.ndarray, unknowns: Iterable[int]) -> np.ndarray:
    """Derivatives of the function by these unknowns, a column each."""
    here, small, units = function(x), 1e-4, np.eye(len(x))
    return np.stack([(function(x + small * units[n]) - here) / small for n in unknowns], 1)


def _least_squares(function: Any, unknowns: Sequence[int]) -> np.ndarray:
    """Gauss-Newton with halved steps over some of the unknowns; the others stay 0."""
    x = np.zeros(len(UNKNOWNS))
    for _ in range(50 if unknowns else 0):
        here = function(x)
        change = np.zeros(len(x))
        slopes = _slopes(function, x, unknowns)
        change[list(unknowns)] = np.linalg.lstsq(slopes, -here, rcond=1e-6)[0]
        change = np.clip(change, -2, 2)
        while np.abs(change).max() > 1e-9 and _norm(function(x + change)) > _norm(here):
            change = change / 2
        x = x + change
        if np.abs(change).max() < 1e-9:
            break
    return x


def _norm(values: np.ndarray) -> float:
    return float(np.square(values).sum())
