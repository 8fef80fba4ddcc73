"""A signal to one rank stops all at the same call, and they do not poll at every call."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident
from types import SimpleNamespace
from typing import Any

import pytest

from irpe_ds.cluster import signals
from irpe_ds.cluster.signals import PreemptionCheck


class Together:
    """Ranks that are threads; counts how often they are asked."""

    def __init__(self, number: int) -> None:
        self.barrier = Barrier(number)
        self.values: dict[int, list[float]] = {}
        self.asked = 0

    def rank(self, number: int) -> Any:
        return _Rank(self, number)


class _Rank:
    def __init__(self, together: Together, number: int) -> None:
        self.together, self.number = together, number

    def all_reduce_max(self, values: list[float]) -> list[float]:
        own = self.together
        own.values[self.number] = values
        own.asked += self.number == 0
        own.barrier.wait(60)
        found = [max(column) for column in zip(*own.values.values(), strict=True)]
        own.barrier.wait(60)
        return found


class Signals:
    received: str | None = None


def calls_until_stopped(
    paces: list[float], signal_at: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], int]:
    """The call at which each rank stops, when the last one gets a signal, and how often all ask."""
    together, clocks = Together(len(paces)), [0.0] * len(paces)
    local: dict[int, int] = {}

    def run(number: int) -> int:
        received = Signals()
        check = PreemptionCheck(together.rank(number), received)  # type: ignore[arg-type]
        for call in range(1, 10_000):
            clocks[number] += paces[number]
            if number == len(paces) - 1 and call == signal_at:
                received.received = "SIGTERM"
            if check():
                return call
        return 0

    def start(number: int) -> int:
        local[get_ident()] = number
        return run(number)

    clock = SimpleNamespace(monotonic=lambda: clocks[local[get_ident()]])
    monkeypatch.setattr(signals, "time", clock)
    with ThreadPoolExecutor(len(paces)) as pool:
        return list(pool.map(start, range(len(paces)))), together.asked


@pytest.mark.parametrize("paces", [[0.1], [0.1, 0.1], [0.05, 0.2, 0.1], [30.0, 1.0], [1e-6, 1e-6]])
def test_all_stop_at_the_same_call_and_soon(
    paces: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, asked = calls_until_stopped(paces, signal_at=201, monkeypatch=monkeypatch)
    assert len(set(stopped)) == 1
    late = stopped[0] - 201
    assert 0 <= late <= signals.POLL_CALLS
    assert late * max(paces) <= signals.POLL_SECONDS
    if max(paces) < 1:
        assert asked < 201 / 4
