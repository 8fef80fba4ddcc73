"""Ranks that do not join are named, and the network interface is chosen."""

import base64
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from irpe_ds.cluster import launchers, rendezvous, waiting
from irpe_ds.errors import ClusterError
from tests.launch.ranks import free_port

HERE = socket.gethostname()


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (variables | {"LOCAL_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    for name in (rendezvous.INTERFACE,):
        monkeypatch.setenv(name, "")  # for pytest to take back what a test leaves
        monkeypatch.delenv(name)


def join(
    *ranks: int, world_size: int = 2, error: ClusterError | None = None, seconds: float = 60
) -> list[str | None]:
    """The error of each of these ranks, threads of this process; None if there is none."""
    stores = []  # of which the first must outlive the others

    def one(rank: int) -> str | None:
        try:
            stores.append(
                rendezvous.rendezvous(rank, world_size, seconds, error if rank == 1 else None)
            )
        except ClusterError as raised:
            return str(raised)
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_join() -> None:
    assert join(0, 1) == [None, None]
    assert os.environ[rendezvous.INTERFACE] == "lo"


def test_on_one_node_the_interface_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert join(0, 1) == [None, None]
    assert rendezvous.INTERFACE not in os.environ


def test_an_absent_rank_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0, 1], "c": [0]}).encode())
    monkeypatch.setattr(
        launchers, "parent_commands", lambda: [["x", f"--world_info={world.decode()}"]]
    )
    began = time.monotonic()
    found = join(0, 2, world_size=4, seconds=6)
    assert time.monotonic() - began < 60
    told = "rank 1 on b, rank 3 on c did not join within 6 s (train.join_seconds)"
    assert found == [told] * 2


def test_an_absent_rank_of_an_unknown_host(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "SECONDS", 2.0)
    (told,) = join(0, world_size=3, seconds=6)
    assert "[rank 0] waiting for ranks 1, 2 to join: 2 s so far\n" in capfd.readouterr().err
    assert told is not None
    assert told.startswith("ranks 1, 2 did not join within 6 s")
    assert told.endswith(f"; only ranks on {HERE} did")


def test_the_first_rank_is_absent() -> None:
    (told,) = join(1, seconds=1)
    assert told is not None
    assert told.startswith("rank 0 at 127.0.0.1, port ")
    assert "did not answer within 1 s" in told


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    error = ClusterError("rank 1 on b", "a GPU for each rank", "1 for 2")
    assert join(0, 1, error=error) == [str(error)] * 2


def test_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", int(os.environ["MASTER_PORT"])))
        taken.listen()
        (told,) = join(0)
    assert told is not None
    assert told.startswith(f"MASTER_PORT on {HERE}: expected a free port, got ")


def test_another_run_is_at_the_port() -> None:
    """Its rank 0 answers: that of this run could not open a store there, as it says."""
    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(lambda rank: rendezvous.rendezvous(rank, 2, 60), range(2)))
    told = join(1, world_size=2) + join(2, world_size=3)
    assert len(first) == 2
    where = f"another run is at 127.0.0.1, port {os.environ['MASTER_PORT']}"
    other = "take another port with deepspeed's --master_port, or MASTER_PORT"
    assert told == [
        f"{where} (rank 1 has joined already): {other}",
        f"{where} (it has 2 ranks, this one 3): {other}",
    ]


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rendezvous.INTERFACE, "ib77")
    told, other = join(0, 1)
    assert told == other
    assert told is not None
    assert told.startswith(f"{rendezvous.INTERFACE} on {HERE}: expected one of ")
    assert told.endswith(", got ib77")


def test_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node.invalid")
    (told,) = join(1)
    assert told is not None
    assert told.startswith(f"{HERE} has no route to node.invalid: ")


class Address:
    def __init__(self, address: str) -> None:
        self.address = address


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"lo": [Address("127.0.0.1")], "ib0": [Address("fe80::1%ib0"), Address("10.9.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)
    rendezvous.set_interface("10.9.0.1")
    assert os.environ[rendezvous.INTERFACE] == "ib0"
    rendezvous.set_interface("127.0.0.1")
    assert os.environ[rendezvous.INTERFACE] == "ib0"
