"""Runs that differ only in their seed, to be drawn as one."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from irpe_ds.config_file import Values, read_values

Rows = Sequence[Mapping[str, Any]]
APART = ("name", "output", "seed", "log")
"""Keys of a configuration that do not make another experiment."""


class Run(NamedTuple):
    """A run folder and the rows of its metrics."""

    folder: Path
    rows: Rows


def one_each(runs: Mapping[str, Run]) -> dict[str, list[Rows]]:
    """Every run as a group of its own."""
    return {name: [run.rows] for name, run in runs.items()}


def group_seeds(runs: Mapping[str, Run]) -> dict[str, list[Rows]]:
    """Rows of runs by name; those of one configuration with different seeds are a group.

    Where a seed is repeated the runs stay apart, as of different code, and so does a run without
    config.yaml.

    Raises:
        ConfigError: a configuration cannot be read.
    """
    configs = {name: _config(run.folder) for name, run in runs.items()}
    alike: list[list[str]] = []
    for name, config in configs.items():
        fitting = (names for names in alike if _is_alike(configs[names[0]], config))
        group = next(fitting, None)
        if group is None:
            alike.append([name])
        else:
            group.append(name)
    groups: dict[str, list[Rows]] = {}
    for names in alike:
        seeds = {str(configs[name].get("seed")) for name in names}
        if 1 < len(names) == len(seeds):
            label = f"{common_name(names)}, {len(names)} seeds"
            label = f"{names[0]}, {len(names)} seeds" if label in groups else label
            groups[label] = [runs[name].rows for name in names]
        else:
            groups |= one_each({name: runs[name] for name in names})
    return groups


def common_name(names: Sequence[str]) -> str:
    """What all names begin with, without separators and `seed` at its end; else the first name."""
    alike = takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    return re.sub(r"[-_.]*(seed)?[-_.]*$", "", common) or names[0]


def _config(folder: Path) -> Values:
    path = folder / "config.yaml"
    return read_values(path) if path.exists() else {}


def _is_alike(one: Values, other: Values) -> bool:
    kinds = ({k: v for k, v in config.items() if k not in APART} for config in (one, other))
    first, second = kinds
    return bool(first) and first == second
