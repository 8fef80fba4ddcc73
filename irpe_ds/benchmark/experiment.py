"""A scaling experiment: runs that differ in nodes, ranks, batch, or any key of a configuration.

Its YAML is that of a run, mostly a `base:` and a name, with a section `scaling`.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from irpe_ds.cluster.hostfile import read_hostfile
from irpe_ds.config import RunConfig, Section, validate
from irpe_ds.config_file import apply, read_values
from irpe_ds.config_types import Count, Positive
from irpe_ds.errors import ClusterError, ConfigError
from irpe_ds.files import or_shipped
from irpe_ds.planner.hardware import parse_rate
from irpe_ds.training.deepspeed_config import read_ds_config

SECTION = "scaling"
SHAPE = ("nodes", "ranks_per_node", "micro_batch")
"""Axes that are not keys of a configuration; the first two default to 1."""


def _rate(text: str | None) -> str | None:
    if text is not None:
        parse_rate("", text)
    return text


class Scaling(Section):
    """The section `scaling`: what to run, and how to measure it."""

    matrix: tuple[dict[str, Any], ...]
    """Each mapping stands for all combinations of its lists. Keys: `nodes`, `ranks_per_node`, any
    `section.key` of a configuration, and `micro_batch` for the same images on every rank (weak
    scaling); without it all ranks share train.global_batch (strong scaling)."""
    warmup: Count = 3
    """Updates before the clock starts."""
    updates: Count = 5
    """Updates of one repetition."""
    repeats: Count = 3
    """Repetitions; the median counts."""
    hostfile: Path | None = None
    """Hosts and slots as DeepSpeed reads them. None: this machine alone."""
    network: Annotated[str | None, AfterValidator(_rate)] = None
    """Rate of a network card, such as 100Gb/s, recorded for the planner's calibration."""
    link_mib: tuple[Positive, ...] = (0.0625, 1, 16, 64)
    """Sizes in MiB that the self-test of links exchanges before the first run; [] leaves it out."""
    timeout: Positive = 900
    """Seconds after which a run counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an experiment."""

    axes: Mapping[str, Any]
    """Its values of the matrix's keys."""
    config: RunConfig
    stage: int
    """ZeRO's."""
    zero: str
    """Hash of the ZeRO JSON: a cell is measured again when the file has changed."""

    @property
    def nodes(self) -> int:
        return int(self.axes.get("nodes", 1))

    @property
    def ranks_per_node(self) -> int:
        return int(self.axes.get("ranks_per_node", 1))

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def key(self) -> str:
        """A hash of the axes in any order."""
        text = json.dumps(self.axes, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def __str__(self) -> str:
        return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in self.axes.items())


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The runs, and how they are measured."""

    config: RunConfig
    """What the cells share; its folder is the experiment's."""
    scaling: Scaling
    cells: Sequence[Cell]

    @property
    def common(self) -> dict[str, Any]:
        """What must be the same for cells to be comparable."""
        common = self.config.model_dump(mode="json", exclude={"name", "output", "log"})
        measuring = {"warmup", "updates", "repeats", "network"}
        return common | {SECTION: self.scaling.model_dump(mode="json", include=measuring)}


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment; overrides are a run's and `scaling.key=value`.

    Raises:
        ConfigError: a mistake in the file, or in the configuration of one of its cells.
        ClusterError: the hostfile cannot be read, or lacks hosts or slots.
    """
    values = read_values(path, overrides)
    if not isinstance(values.get(SECTION), dict):
        raise ConfigError(path, f"a section {SECTION} with a matrix", values.get(SECTION))
    scaling = validate(Scaling, values.pop(SECTION), SECTION)
    config = validate(RunConfig, values)
    cells = {}
    for number, matrix in enumerate(scaling.matrix, 1):
        where = f"{SECTION}.matrix, {number}"
        for key, value in matrix.items():
            if value == []:
                raise ConfigError(f"{where}: {key}", "at least one value", "none")
        for axes in _combinations(matrix):
            cell = _cell(config, axes, where)
            cells[cell.key] = cell
    if not cells:
        raise ConfigError(f"{SECTION}.matrix", "at least one cell", "none")
    for cell in cells.values():
        _check_hosts(scaling.hostfile, cell)
    return Experiment(config=config, scaling=scaling, cells=list(cells.values()))


def _check_hosts(hostfile: Path | None, cell: Cell) -> None:
    if hostfile is None:
        if cell.nodes > 1:
            raise ConfigError(f"{SECTION}.hostfile", f"a hostfile with {cell.nodes} hosts", "none")
        return
    hosts = read_hostfile(hostfile)[: cell.nodes]
    expected = f"{cell.nodes} hosts with {cell.ranks_per_node} slots each"
    if len(hosts) < cell.nodes:
        raise ClusterError(hostfile, expected, f"{len(hosts)} hosts")
    for host in hosts:
        if host.slots < cell.ranks_per_node:
            raise ClusterError(hostfile, expected, f"{host.name} with {host.slots}")


def _combinations(matrix: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in matrix.values()]
    for values in itertools.product(*lists):
        yield dict(zip(matrix, values, strict=True))


def _cell(config: RunConfig, axes: dict[str, Any], where: str) -> Cell:
    for key in SHAPE:
        if key in axes and (type(axes[key]) is not int or axes[key] < 1):
            raise ConfigError(f"{where}: {key}", "a positive integer", repr(axes[key]))
    if "micro_batch" in axes and "train.global_batch" in axes:
        raise ConfigError(where, "micro_batch or train.global_batch, not both", axes)
    values = config.model_dump(mode="json")
    for key, value in axes.items():
        if key not in SHAPE:
            apply(values, key, value)
    cell_config = validate(RunConfig, values)
    file = cell_config.train.deepspeed
    stage = int(read_ds_config(file)["zero_optimization"]["stage"])
    zero = hashlib.sha256(or_shipped(file).read_bytes()).hexdigest()[:8]
    cell = Cell(axes=axes, config=cell_config, stage=stage, zero=zero)
    if "micro_batch" in axes:
        batch = axes["micro_batch"] * cell.ranks * cell_config.train.accumulation
        apply(values, "train.global_batch", batch)
    apply(values, "name", cell.key)
    apply(values, "output", str(config.folder / "cells"))
    apply(values, "log.wandb.group", config.name)
    return replace(cell, config=validate(RunConfig, values))
