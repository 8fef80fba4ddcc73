"""What the check before a run makes of the hosts' reports; querying them: test_hosts.py."""

from pathlib import Path

import pytest

from irpe_ds.cluster.consistency import SOURCE
from irpe_ds.cluster.hostfile import Host
from irpe_ds.cluster.preflight import HostReport, _read_exports, problems, table
from irpe_ds.errors import ClusterError

HOSTS = [Host("a", 8), Host("b", 8), Host("c", 8), Host("d", 8)]
FACTS = {SOURCE: "12ab (commit 9f)", "the attention op": "fused"}
REPORTS = [
    HostReport(FACTS, "eth0", 8),
    HostReport(FACTS, "eth0", 7),
    ClusterError("c", "an answer over ssh", "nothing"),
    HostReport(FACTS | {"the attention op": "gather"}, None, 8),
]


def test_every_problem_is_named_by_host() -> None:
    assert [str(problem) for problem in problems(HOSTS, REPORTS)] == [
        "c: expected an answer over ssh, got nothing",
        "b: expected 8 free GPUs, one for each slot, got 7",
        "d: expected the attention op fused, as a has, got gather",
    ]
    on_processors = [HostReport(FACTS, "eth0", None)] * 4
    assert problems(HOSTS, on_processors) == []


def test_a_line_for_each_host() -> None:
    lines = [line.split() for line in table(HOSTS, REPORTS).splitlines()]
    assert lines[2] == ["b", "8", "7", "eth0", "fused", "12ab", "(commit", "9f)"]
    assert lines[3] == ["c", "8", "?", "?", "?", "?"]
    assert lines[4][3:5] == ["none", "gather"]


def test_deepspeeds_environment_file(tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text("NCCL_DEBUG=INFO\n A = b=c \n")
    assert _read_exports(path) == {"NCCL_DEBUG": "INFO", "A": "b=c"}
    path.write_text("")
    assert _read_exports(path) == {}


@pytest.mark.parametrize("line", ["NCCL_DEBUG", "", "$(id)=1", "a b=1", "=1"])
def test_a_line_that_deepspeed_or_a_shell_would_not_take(line: str, tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"A=1\n{line}\n")
    with pytest.raises(ClusterError, match=r"\.deepspeed_env, line 2: expected NAME=VALUE, got "):
        _read_exports(path)
