"""Ranks that do not come are named, and the network interface is chosen."""

import base64
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from irpe_ds.cluster import launchers, rendezvous
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


def meet(
    *ranks: int, world_size: int = 2, fault: ClusterError | None = None, seconds: float = 60
) -> list[str | None]:
    """What these ranks, threads of this process, are told; None where all is well."""
    stores = []  # of which the first must outlive the others

    def one(rank: int) -> str | None:
        try:
            stores.append(
                rendezvous.rendezvous(rank, world_size, seconds, fault if rank == 1 else None)
            )
        except ClusterError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_come() -> None:
    assert meet(0, 1) == [None, None]
    assert os.environ[rendezvous.INTERFACE] == "lo"


def test_on_one_node_the_interface_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert meet(0, 1) == [None, None]
    assert rendezvous.INTERFACE not in os.environ


def test_an_absent_rank_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0, 1], "c": [0]}).encode())
    monkeypatch.setattr(launchers, "parents", lambda: [["x", f"--world_info={world.decode()}"]])
    began = time.monotonic()
    found = meet(0, 2, world_size=4, seconds=6)
    assert time.monotonic() - began < 12
    told = "expected to join within 6 s (train.join_seconds), got no sign of life"
    assert found == [f"rank 1 on b, rank 3 on c: {told}"] * 2


def test_an_absent_rank_of_an_unknown_host() -> None:
    (told,) = meet(0, world_size=3, seconds=6)
    assert told is not None
    assert told.startswith("ranks 1, 2: expected to join")
    assert told.endswith(f"no sign of life, only ranks on {HERE}")


def test_the_first_rank_is_absent() -> None:
    (told,) = meet(1, seconds=1)
    assert told is not None
    assert told.startswith("rank 0 on 127.0.0.1, port ")
    assert "an answer within 1 s" in told


def test_a_fault_of_one_is_told_to_all() -> None:
    fault = ClusterError("rank 1 on b", "a GPU for each rank", "1 for 2")
    assert meet(0, 1, fault=fault) == [str(fault)] * 2


def test_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", int(os.environ["MASTER_PORT"])))
        taken.listen()
        (told,) = meet(0)
    assert told is not None
    assert told.startswith(f"MASTER_PORT on {HERE}: expected a free port, got ")


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rendezvous.INTERFACE, "ib77")
    told, other = meet(0, 1)
    assert told == other
    assert told is not None
    assert told.startswith(f"{rendezvous.INTERFACE} on {HERE}: expected one of ")
    assert told.endswith(", got ib77")


def test_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node.invalid")
    (told,) = meet(1)
    assert told is not None
    assert told.startswith(f"{HERE}: expected a way to node.invalid, got ")


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
