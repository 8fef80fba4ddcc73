"""Bytes that leave a host: the planner's counts against the counter of its network interface."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import SUBNET, Hosts, missing, python_environment
from tests.planner.test_deepspeed import Case, counted, instructions, results_of

REASON = missing()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]
WIDE = ("model.options.embed_dim=256", "model.options.num_heads=4")
"""So large that the headers of a collective, some 600 bytes, are few beside what it carries."""
CASES: list[Case] = [(f"stage {stage}", "fp32", 1, 0) for stage in range(4)]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "WIRE": "eth0"}
    with Hosts(tmp_path, 2, python_environment() | environment) as hosts:
        yield hosts


def test_every_stage_sends_what_was_counted(hosts: Hosts, tmp_path: Path) -> None:
    cases = json.dumps([instructions(case, *WIDE) for case in CASES])
    script = ["python", "-m", "tests.planner.deepspeed_ranks"]
    ranks = [
        hosts.start([*script, rank, 2, f"{SUBNET}.1", 29500, tmp_path, cases], output, host)
        for rank, host in enumerate(hosts.names)
        for output in [tmp_path / host]
    ]
    assert [rank.wait(600) for rank in ranks] == [0, 0], (tmp_path / "node1").read_text()
    found = results_of((tmp_path / "node1").read_text())
    for case, measured in zip(CASES, found, strict=True):
        expected = sum(send.sent(2, "gloo") for send in counted(case, *WIDE))
        assert measured["wire"] == pytest.approx(expected, rel=0.02), case
