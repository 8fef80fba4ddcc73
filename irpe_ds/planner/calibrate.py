"""Fits assumptions to the results of a scaling experiment."""

import csv
import io
import itertools
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import approx_fprime, least_squares

from irpe_ds.errors import ConfigError
from irpe_ds.files import read_regular
from irpe_ds.planner.assumptions import Assumptions
from irpe_ds.planner.hardware import Cluster, parse_rate
from irpe_ds.planner.plan import Scenario
from irpe_ds.planner.zero import Zero
from irpe_ds.schema import Plain, parse_json

LIMIT = 32 << 20
"""Largest file that is read, bytes."""

COLUMNS = ("model", "ranks", "nodes", "stage", "micro_batch", "images_per_s")
"""Columns that a row must have; `accumulation` defaults to 1, the rest to the plan's."""

KNOWN_AXES = {
    *("nodes", "ranks_per_node", "micro_batch", "model.name", "model.rpe"),
    *(f"train.{key}" for key in ("global_batch", "accumulation", "precision", "deepspeed")),
}
"""Axes of an experiment that the plan takes into account; runs with others are left out."""

UNKNOWNS = (("flop_share", "memory_share"), ("link_share",), ("hook_us",), ("latency",))
"""Assumptions that may be fitted, the most important first; those of a group move together."""

DELTA = 1e-4
"""Step of the finite differences, in the logarithm of an assumption."""


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
    """Rate of a network card, bytes per second. None: the plan's."""
    file: str | None = None
    """Name of the ZeRO settings. None: those of the stage."""

    @property
    def seconds(self) -> float:
        """Measured time of an update."""
        return self.micro_batch * self.accumulation * self.ranks / self.images_per_s

    @property
    def zero(self) -> int | str:
        """The key of its ZeRO settings."""
        return self.stage if self.file is None else self.file


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted assumptions, and how well the results then agree."""

    assumed: Assumptions
    results: int
    """Number of results that it was fitted to."""
    worst: float
    """Largest relative error of an update's time."""


def read_results(
    path: Path,
    model: str,
    precision: str,
    rpe: str = "",
    shape: Mapping[str, Any] | None = None,
) -> list[Result]:
    """The rows of a CSV or JSON with this model in this precision.

    Takes the files of `launch/scaling.py`, or lists of rows with COLUMNS. Left out are failed
    runs, which have no speed, and runs on axes that the plan does not take into account.

    Args:
        rpe: what `model.rpe` puts relative position on.
        shape: keys of the section `model` that must equal the experiment's; a CSV has none.

    Raises:
        ConfigError: the file cannot be read, lacks a column, has no such row, or another shape.
    """
    rows = _read_rows(path)
    if isinstance(rows, dict):
        settings = rows.get("settings")
        measured = settings.get("model") if isinstance(settings, dict) else None
        measured = measured if isinstance(measured, dict) else {}
        for key, value in (shape or {}).items():
            if measured.get(key, value) != value:
                raise ConfigError(f"{path}: model.{key}", value, measured[key])
        rows = rows.get("rows", rows)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(path, "a list of rows", type(rows).__name__)
    wanted = {"model": model, "precision": precision, "rpe": rpe}
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        has_speed = row.get("images_per_s") not in ("", None)
        if "error" in row and not has_speed:
            continue
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            expected = f"the columns {', '.join(COLUMNS)}"
            raise ConfigError(where, expected, f"none named {missing[0]}")
        same = all(row.get(key, value) == value for key, value in wanted.items())
        if has_speed and same and _axes(row, where).keys() <= KNOWN_AXES:
            found.append(_result(row, where))
    if not found:
        got = f"none among {len(rows)}"
        raise ConfigError(path, f"results of {model} in {precision}", got)
    return found


def _read_rows(path: Path) -> Any:
    try:
        text = read_regular(path, LIMIT)
    except OSError as error:
        got = f"{path}: {error.strerror}"
        raise ConfigError("--calibrate", "a readable CSV or JSON", got) from None
    if path.suffix == ".json":
        return parse_json(text, Plain, path, ConfigError)
    try:
        table = csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True)
        columns, *lines = [cells for cells in table if cells] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(path, "valid CSV", error) from None
    if len({*columns}) < len(columns):
        raise ConfigError(path, "every column once", ", ".join(columns))
    for number, cells in enumerate(lines, 1):
        if len(cells) > len(columns):
            raise ConfigError(f"{path}, row {number}", f"{len(columns)} cells", len(cells))
    return [dict(itertools.zip_longest(columns, cells, fillvalue="")) for cells in lines]


def _axes(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The axes of a row, of which a CSV has the JSON."""
    axes = row.get("axes") or {}
    if isinstance(axes, str):
        return parse_json(axes, dict[str, Plain], f"{where}: axes", ConfigError)
    if not isinstance(axes, dict):
        raise ConfigError(f"{where}: axes", "an object", reprlib.repr(axes))
    return axes


def _result(row: Mapping[str, Any], where: str) -> Result:
    try:
        counts = {name: _count(row[name]) for name in ("ranks", "nodes", "stage", "micro_batch")}
        accumulation, speed = _count(row.get("accumulation") or 1), _speed(row["images_per_s"])
    except (ValueError, OverflowError) as error:
        raise ConfigError(where, "numbers", error) from None
    network, file = row.get("network") or None, row.get("deepspeed") or None
    for key, text in (("network", network), ("deepspeed", file)):
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{where}: {key}", "text", reprlib.repr(text))
    result = Result(
        **counts,
        accumulation=accumulation,
        images_per_s=speed,
        network=None if network is None else parse_rate(f"{where}: network", network),
        file=file,
    )
    positive = min(result.ranks, result.nodes, result.micro_batch, accumulation) > 0
    possible = positive and 1e-6 < speed < 1e12 and result.ranks % result.nodes == 0
    if not possible or result.stage not in (0, 1, 2, 3):
        expected = "positive numbers, whole nodes, a stage from 0 to 3"
        raise ConfigError(where, expected, reprlib.repr(dict(row)))
    return result


def _count(value: object) -> int:
    """An integer from 0 of a CSV or JSON; raises ValueError."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    if type(value) is int and 0 <= value < 10**9:
        return value
    raise ValueError(reprlib.repr(value))


def _speed(value: object) -> float:
    """A number of a CSV or JSON; raises ValueError."""
    if isinstance(value, str) or type(value) in (int, float):
        return float(value[:100] if isinstance(value, str) else value)  # type: ignore[arg-type]
    raise ValueError(reprlib.repr(value))


def calibrate(
    scenario: Scenario, cluster: Cluster, results: Sequence[Result], zeros: Mapping[int | str, Zero]
) -> Calibration:
    """Fit the UNKNOWNS that the results depend on, at most one for each different run.

    Least squares of the logarithm of an update's time, over the logarithms of the unknowns.

    Args:
        zeros: the ZeRO settings that results were measured with, by name or else by stage.

    Raises:
        ConfigError: a result with ZeRO settings that are not among them.
    """
    for result in results:
        if result.zero not in zeros:
            expected = f"results of {', '.join(map(str, zeros))}"
            raise ConfigError("--calibrate", expected, result.file or f"stage {result.stage}")

    def errors(logs: np.ndarray) -> np.ndarray:
        """Logarithm of planned over measured time, for each result."""
        tried = replace(scenario, assumed=_scaled(scenario.assumed, logs))
        times = [(planned_seconds(tried, cluster, r, zeros), r.seconds) for r in results]
        return np.array([math.log(planned / measured) for planned, measured in times])

    runs = {replace(result, images_per_s=1.0) for result in results}
    logs = np.zeros(len(UNKNOWNS))
    slopes = np.abs(approx_fprime(logs, errors, DELTA)).reshape(len(results), -1).max(0)
    fitted = np.flatnonzero(slopes > 1e-3)[: len(runs)]
    if len(fitted):

        def errors_of(values: np.ndarray) -> np.ndarray:
            x = np.zeros(len(UNKNOWNS))
            x[fitted] = values
            return errors(x)

        logs[fitted] = least_squares(errors_of, logs[fitted], diff_step=DELTA, xtol=1e-9).x
    names = tuple(name for n in fitted for name in UNKNOWNS[n])
    worst = float(np.abs(np.expm1(errors(logs))).max())
    assumed = replace(_scaled(scenario.assumed, logs), fitted=names)
    return Calibration(assumed=assumed, results=len(results), worst=worst)


def _scaled(assumed: Assumptions, logs: np.ndarray) -> Assumptions:
    factors = zip(UNKNOWNS, np.exp(logs).tolist(), strict=True)
    return replace(
        assumed, **{name: x * getattr(assumed, name) for names, x in factors for name in names}
    )


def planned_seconds(
    scenario: Scenario, cluster: Cluster, result: Result, zeros: Mapping[int | str, Zero]
) -> float:
    """What an update of a result's run is planned to take."""
    # A node has the same network cards, however many of its GPUs take part.
    measured = replace(cluster, gpus=result.ranks, per_node=result.ranks // result.nodes)
    if result.network is not None:
        measured = replace(measured, inter=result.network * cluster.nics)
    own = replace(scenario, zero=zeros[result.zero])
    return own.step_time(measured, result.micro_batch, result.accumulation).total
