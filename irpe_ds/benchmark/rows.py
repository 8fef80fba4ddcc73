"""The rows of a scaling experiment, one for each run, and the file that has them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from typing_extensions import Required, TypedDict

from irpe_ds.benchmark.experiment import Experiment
from irpe_ds.config_types import Natural, Positive
from irpe_ds.errors import ConfigError
from irpe_ds.files import read_regular, replace_file
from irpe_ds.schema import Plain, parse_json, spell

RESULTS = "results.json"
LIMIT = 32 << 20
"""Largest results.json that is read, bytes."""
KIND = "scaling"
"""Kind of the row that a run logs."""
RANKS = "ranks.json"
"""File of a run's folder with more columns, which have a value for each rank."""
CellRow = dict[str, Any]
"""Facts and measurements of one run by column."""

PHASES = ("data", "forward", "backward", "optimizer", "communication")
"""Phases of an update; each has a column `{phase}_ms`, measured by StepProfiler."""
INSTRUMENTED_STEP_MS = "apart_ms"
"""Column of the sum of all phases, under the name that it has in existing files."""


Label = Annotated[str, Field(max_length=200)]
Some = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
Measured = Annotated[float, Field(strict=True, ge=0, lt=1e18)]


class RankColumns(TypedDict, total=False):
    """The file RANKS: `rank_columns`."""

    rank_ms: Annotated[list[Positive], Field(min_length=1)]
    rank_mhz: list[Measured]
    rank_watt: list[Measured]
    rank_celsius: list[Annotated[float, Field(strict=True)]]
    slowest_rank: Natural
    slowest_host: str


class SavedRow(RankColumns, total=False):
    """A row as it is read back. Rows written before lack some columns, failed runs have none."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    key: Required[Label]
    axes: Required[dict[str, Plain]]
    error: str
    scaling: Literal["weak", "strong"]
    nodes: Some
    ranks: Some
    micro_batch: Some
    global_batch: Some
    accumulation: Some
    deepspeed: Label
    zero: Label
    images_per_s: Measured
    slowest_images_per_s: Measured
    fastest_images_per_s: Measured
    step_ms: Measured
    data_ms: Measured
    forward_ms: Measured
    backward_ms: Measured
    optimizer_ms: Measured
    communication_ms: Measured
    apart_ms: Positive
    memory_gib: Measured
    tflops: Measured
    mfu: Measured


class SavedLink(TypedDict, total=False):
    """One collective on one size; see `links.measure`."""

    collective: Literal["all_reduce", "all_gather"]
    where: Literal["intra", "inter", "all"]
    ranks: Some
    bytes: Annotated[float, Field(strict=True, gt=0, lt=1e18)]
    ms: Measured
    fastest_ms: Measured
    gb_s: Measured
    slowest: str


class Links(TypedDict, total=False):
    """What the self-test of links has found."""

    rows: list[SavedLink]
    error: str


class SavedResults(TypedDict, total=False):
    """A results.json."""

    name: Required[Label]
    settings: Required[dict[str, Plain]]
    rows: Required[list[SavedRow]]
    links: Links | None


class Results:
    """The file with all rows of an experiment, replaced as a whole when one is added.

    Raises:
        ConfigError: the file exists, with cells that cannot be compared with these.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.path = experiment.config.folder / RESULTS
        self._name, self._common = experiment.config.name, experiment.common
        self.rows: dict[str, CellRow] = {}
        self.links: dict[str, Any] | None = None
        if not self.path.exists():
            return
        saved = read_results_file(self.path)
        self.rows = {row["key"]: row for row in saved["rows"]}
        self.links = saved.get("links")
        found = first_difference(saved["settings"], self._common)
        if found is not None:
            key, before, now = found
            expected = f"{before!r} as in {self.path}, or name=... to start another experiment"
            raise ConfigError(key, expected, repr(now))

    def add(self, row: CellRow) -> None:
        """Add a row, or replace that of the same cell."""
        self.rows[row["key"]] = row
        self._write()

    def add_links(self, links: dict[str, Any]) -> None:
        """Add what the self-test of links has found."""
        self.links = links
        self._write()

    def _write(self) -> None:
        content = {
            "name": self._name,
            "settings": self._common,
            "links": self.links,
            "rows": [
                {k: spell(v) if isinstance(v, float) else v for k, v in row.items()}
                for row in self.rows.values()
            ],
        }
        replace_file(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_results_file(path: Path) -> dict[str, Any]:
    """The content of a results.json: name, settings, rows, links.

    Raises:
        ConfigError: the file cannot be read, or is not a results file.
    """
    expected = "the results of a scaling experiment"
    try:
        text = read_regular(path, LIMIT)
        content = parse_json(text, SavedResults, path.name, ConfigError)
        rows: list[Mapping[str, Any]] = [*content["rows"]]
        for number, row in enumerate(rows):
            _check_row(row, f"{path.name}: rows.{number}")
        if len({row["key"] for row in rows}) < len(rows):
            raise ConfigError(f"{path.name}: rows", "every key once", "one twice")
    except OSError as error:
        raise ConfigError(path, expected, error.strerror) from None
    except ConfigError as error:
        raise ConfigError(path, expected, f"another file: {error}") from None
    return dict(content)


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for columns that do not fit one another, or without any measurement."""
    if "error" not in row:
        check_columns([row], ("images_per_s", "step_ms"), where)
        if not row["images_per_s"]:
            raise ConfigError(f"{where}: images_per_s", "a number above 0", 0)
    count = len(row.get("rank_ms", ()))
    if row.get("slowest_rank", 0) >= max(count, 1):
        raise ConfigError(f"{where}: slowest_rank", f"one of {count} ranks", row["slowest_rank"])
    for key, value in row.items():
        is_list = key in ("rank_mhz", "rank_watt", "rank_celsius")
        if is_list and len(value) != count:
            raise ConfigError(f"{where}: {key}", f"a number for each of {count} ranks", len(value))
        if key.endswith("_bytes") and type(value) not in (int, float):
            raise ConfigError(f"{where}: {key}", "a number", repr(value))


def check_columns(rows: Iterable[Mapping[str, Any]], columns: Iterable[str], where: object) -> None:
    """Raise ConfigError if a row lacks one of the columns."""
    for row in rows:
        for column in columns:
            if column not in row:
                raise ConfigError(where, f"the column {column} in every row", "none")


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose value differs between two nested dictionaries of `Plain` values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (key, before, now)
    for name in {**before, **now}:
        inner = f"{key}.{name}" if key else name
        found = first_difference(before.get(name), now.get(name), inner)
        if found is not None:
            return found
    return None
