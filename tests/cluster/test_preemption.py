"""A signal to any rank stops all at the same call: ranks are threads here, with a real store."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from random import Random
from threading import Barrier, Event
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from irpe_ds.cluster import preemption
from irpe_ds.cluster.preemption import PreemptionSync

CALLS = 40
Work = Callable[[PreemptionSync, int], int | None]


class Client:
    """A client of a store that notes what it asks for."""

    def __init__(self, store: Store, asked: list[str]) -> None:
        self._store, self._asked = store, asked

    def __getattr__(self, name: str) -> Any:
        self._asked.append(name)
        return getattr(self._store, name)


@cache
def clients() -> list[TCPStore]:
    """Two of each rank. All tests use them: where names of hosts are slow, so is connecting."""

    def connect(port: int, serves: bool) -> TCPStore:
        timeout = timedelta(seconds=60)
        return TCPStore("127.0.0.1", port, None, serves, timeout=timeout, wait_for_workers=False)

    server = connect(0, True)
    return [server, *(connect(server.port, False) for _ in range(7))]


@contextmanager
def ranks(number: int) -> Iterator[tuple[list[Any], list[str], Callable[[Work], list[Any]]]]:
    """Signals of each rank, requests to the store, and what runs a function on every rank."""
    asked: list[str] = []
    prefix = str(time.monotonic_ns())
    stores = [Client(PrefixStore(prefix, client), asked) for client in clients()]
    signals = [SimpleNamespace(received=None, arrived=Event()) for _ in range(number)]
    heartbeats = [
        SimpleNamespace(store=own, connect=lambda waits=waits: waits, silence=60)
        for own, waits in zip(stores[:4], stores[4:], strict=True)
    ]

    def run(work: Work) -> list[Any]:
        def one(rank: int) -> int | None:
            here: Any = SimpleNamespace(rank=rank, world_size=number, is_main=rank == 0)
            with PreemptionSync(here, signals[rank], heartbeats[rank]) as sync:
                return work(sync, rank)

        with ThreadPoolExecutor(number) as pool:
            return list(pool.map(one, range(number)))

    yield signals, asked, run
    for signal in signals:
        signal.arrived.set()


def send(signal: Any) -> None:
    signal.received = "SIGTERM"
    signal.arrived.set()


@pytest.mark.parametrize("receivers", [[0], [3], [1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("at", [1, 7, CALLS])
def test_all_stop_after_the_update_in_which_the_signal_arrived(
    receivers: list[int], at: int
) -> None:
    """Ranks that leave each update together, as a collective makes them."""
    update = Barrier(4)

    def work(sync: PreemptionSync, rank: int) -> int | None:
        for call in range(1, CALLS + 1):
            update.wait(60)
            if call == at:
                if rank in receivers:
                    send(signals[rank])
                while sync._promised > call:  # the update goes on while the threads agree
                    time.sleep(0.001)
                update.wait(60)
            if sync.reached():
                return call
        return None

    with ranks(4) as (signals, _, run):
        assert run(work) == [at] * 4


@pytest.mark.parametrize("seed", range(30))
def test_ranks_at_different_calls_stop_at_the_same(seed: int) -> None:
    """As in an evaluation, where ranks do not wait for each other."""
    random = Random(seed)
    receivers = random.sample(range(4), random.randint(1, 2))
    moment = random.randint(1, CALLS)
    paces = [random.choice([0.0, 0.0002, 0.002]) for _ in range(4)]
    made = [0] * 4

    def work(sync: PreemptionSync, rank: int) -> int | None:
        for call in range(1, CALLS + 1):
            time.sleep(paces[rank])
            made[rank] = call
            if rank in receivers and call == moment:
                send(signals[rank])
            if sync.reached():
                return call
        return None

    with ranks(4) as (signals, _, run):
        (stopped,) = set(run(work))
    assert made == [stopped or CALLS] * 4


def test_nothing_is_sent_until_there_is_a_signal() -> None:
    started = Barrier(3)

    def work(sync: PreemptionSync, rank: int) -> int:
        while asked.count("wait") != 3:
            time.sleep(0.001)
        started.wait(60)
        before = len(asked)
        assert not any(sync.reached() for _ in range(10_000))
        sent = len(asked) - before
        started.wait(60)
        return sent

    with ranks(3) as (_, asked, run):
        assert run(work) == [0] * 3
    assert Counter(asked) == {
        "wait": 3,
        "set": 3 + 3 + 1,
        "multi_get": 1,
        "get": 3,
        "set_timeout": 4,
    }


def test_a_rank_that_does_not_answer_is_named() -> None:
    lost: list[tuple[int, float]] = []
    here: Any = SimpleNamespace(world_size=3)
    heartbeat: Any = SimpleNamespace(silence=0.2, publish_lost=lambda *found: lost.append(found))
    sync = PreemptionSync(here, signals=None, heartbeat=heartbeat)
    sync._store = PrefixStore("silent", clients()[1])
    for rank in (0, 2):
        sync._store.set(preemption._promise(rank), "5")
    with pytest.raises(DistStoreError):
        sync._promises()
    assert lost == [(1, 0.1)]


def test_a_rank_that_fails_stops_no_other() -> None:
    """They learn of it by their collectives."""
    failed = Event()

    def work(sync: PreemptionSync, rank: int) -> bool:
        if rank == 1:
            failed.set()
            raise RuntimeError("broken")
        failed.wait(60)
        sync._agreement.join(60)
        return any(sync.reached() for _ in range(100))

    found: dict[int, bool] = {}

    def noted(sync: PreemptionSync, rank: int) -> int | None:
        found[rank] = work(sync, rank)
        return None

    with ranks(3) as (_, _, run), pytest.raises(RuntimeError, match="broken"):
        run(noted)
    assert found == {0: False, 2: False}


def test_one_rank_needs_no_store() -> None:
    signals: Any = SimpleNamespace(received=None)
    alone: Any = SimpleNamespace(world_size=1)
    with PreemptionSync(alone, signals, heartbeat=None) as sync:
        assert not sync.reached()
        signals.received = "SIGTERM"
        assert sync.reached()
