"""Signals that stop a run are recorded; a terminal that closes sends one of them."""

import os
import signal
from collections.abc import Iterator

import pytest

from irpe_ds.cluster.signals import SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_recorded(number: signal.Signals) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.arrived.wait(60)
        assert stop.received == number.name


def test_under_nohup_a_terminal_that_closes_stops_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.arrived.wait(60)
        assert stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
