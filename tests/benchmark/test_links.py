"""Which ranks test which links, and that the bandwidth follows from time and traffic."""

import json
import sys
from pathlib import Path

import pytest

from irpe_ds.benchmark.links import TRAFFIC, places
from tests.forks import start
from tests.launch.ranks import free_port

TWO_BY_TWO = {"intra": [[0, 1], [2, 3]], "inter": [[0, 2], [1, 3]], "all": [[0, 1, 2, 3]]}


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aabb", TWO_BY_TWO),
        ("aa", {"intra": [[0, 1]]}),
        ("ab", {"inter": [[0, 1]]}),
        ("aabbb", {"intra": [[0, 1], [2, 3, 4]], "all": [[0, 1, 2, 3, 4]]}),
        ("a", {}),
    ],
)
def test_places(hosts: str, expected: dict[str, list[list[int]]]) -> None:
    assert places(list(hosts)) == expected


def pretend_hosts(rank: int, port: int, out: Path) -> None:
    """The self-test as rank of four, on two hosts by name."""
    import os
    import socket

    from irpe_ds.benchmark import links

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}
    os.environ |= {key: str(value) for key, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    socket.gethostname = lambda: "ab"[rank // 2]
    sys.argv = ["links", "--out", str(out), "--join_seconds", "300", "--mib", "0.01", "0.1"]
    links.main()


@pytest.mark.dist
def test_four_ranks_on_two_hosts(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "links.json"
    processes = [start(pretend_hosts, rank, port, out) for rank in range(4)]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    rows = json.loads(out.read_text())
    kinds = [(row["where"], row["collective"], row["ranks"], row["bytes"]) for row in rows]
    assert kinds == [
        (where, kind, number, int(mib * 2**20))
        for where, number in (("intra", 2), ("inter", 2), ("all", 4))
        for kind in TRAFFIC
        for mib in (0.01, 0.1)
    ]
    for row in rows:
        n = row["ranks"]
        sent = TRAFFIC[row["collective"]] * row["bytes"] * (n - 1) / n
        assert row["gb_s"] == pytest.approx(sent / (row["ms"] / 1000) / 1e9)
        assert 0 < row["fastest_ms"] <= row["ms"]
    slowest = {row["where"]: row["slowest"] for row in rows}
    assert slowest["intra"] in ("ranks 0, 1 on a", "ranks 2, 3 on b")
    assert slowest["inter"] in ("rank 0 on a, rank 2 on b", "rank 1 on a, rank 3 on b")
    assert slowest["all"] == "ranks 0, 1 on a ..."
