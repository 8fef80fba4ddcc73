"""A trace has the updates that it was asked for."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from irpe_ds.training.trace import SKIPPED, Trace

RANKS: Any = SimpleNamespace(rank=3)


def traced(folder: Path, updates: int | None, done: int) -> int:
    """How many updates of those done are in the trace: each is one sine."""
    with Trace(updates, folder, RANKS) as trace:
        for _ in range(done):
            torch.zeros(3).sin()
            trace.step()
    with gzip.open(folder / "traces/rank-3.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "aten::sin" for event in events)


def test_the_updates_after_those_that_are_skipped(tmp_path: Path) -> None:
    assert traced(tmp_path, 2, SKIPPED + 5) == 2


def test_a_run_that_ends_sooner_leaves_what_there_is(tmp_path: Path) -> None:
    assert traced(tmp_path, 9, SKIPPED + 3) == 3


def test_without_a_number_nothing_is_written(tmp_path: Path) -> None:
    with Trace(None, tmp_path, RANKS) as trace:
        trace.step()
    assert not [*tmp_path.iterdir()]
