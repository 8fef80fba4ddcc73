"""Updates, epochs or minutes between evaluations and between checkpoints."""

import pytest

from irpe_ds.config_types import Interval, every
from irpe_ds.errors import ConfigError
from irpe_ds.training import intervals
from irpe_ds.training.intervals import Recurrence
from tests.checkpoint_ranks import SOLO


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        (500, 500, "update"),
        ("500", 500, "update"),
        ("1 update", 1, "update"),
        ("2 epochs", 2, "epoch"),
        ("30 minutes", 30, "minute"),
    ],
)
def test_it_is_read(text: object, count: int, unit: str) -> None:
    assert every(text) == Interval(count, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [0, -1, 1.5, True, None, "often", "2 weeks", "1.5 epochs"])
def test_what_is_no_interval(text: object) -> None:
    with pytest.raises(ConfigError, match="a number of updates, or such as `2 epochs`"):
        every(text)


def due(interval: Interval | None, updates: int, log_every: int = 2) -> list[int]:
    recurrence = Recurrence(interval, 4, log_every, SOLO)
    return [update for update in range(1, updates + 1) if recurrence.is_due(update)]


def test_updates_and_epochs() -> None:
    assert due(None, 20) == []
    assert due(Interval(3, "update"), 10) == [3, 6, 9]
    assert due(Interval(2, "epoch"), 20) == [8, 16]
    assert Recurrence(Interval(2, "epoch"), 4, 1, SOLO).falls_on(8)


def test_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of 25 seconds, the clock looked at after every second one."""
    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(intervals.time, "monotonic", lambda: next(now))
    # Every look reads the clock once, and once more when it is due.
    assert due(Interval(2, "minute"), 20) == [6, 12, 18]
    assert not Recurrence(Interval(2, "minute"), 4, 1, SOLO).falls_on(4)
