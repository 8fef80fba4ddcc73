"""The rows of a scaling experiment, one for each run, and the file that has them."""

import json
from pathlib import Path
from typing import Any

from irpe_ds.benchmark.experiment import Experiment
from irpe_ds.errors import ConfigError
from irpe_ds.files import replace_file

RESULTS = "results.json"
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
            "rows": list(self.rows.values()),
        }
        replace_file(self.path, json.dumps(content, indent=1) + "\n")


def read_results_file(path: Path) -> dict[str, Any]:
    """The content of a results.json: name, settings, rows.

    Raises:
        ConfigError: the file cannot be read, or is not a results file.
    """
    try:
        content = json.loads(path.read_text())
        rows = content["rows"]
        if {"name", "settings"} <= content.keys() and all(
            {"key", "axes"} <= row.keys() for row in rows
        ):
            return dict(content)
    except OSError as error:
        raise ConfigError(path, "the results of a scaling experiment", error.strerror) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(path, "the results of a scaling experiment", "another file")


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose value differs between two nested dictionaries."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (key, before, now)
    for name in {**before, **now}:
        inner = f"{key}.{name}" if key else name
        found = first_difference(before.get(name), now.get(name), inner)
        if found is not None:
            return found
    return None
