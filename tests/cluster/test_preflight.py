"""What the check before a run says of what the hosts have told; asking them: test_hosts.py."""

from irpe_ds.cluster.consistency import SOURCE
from irpe_ds.cluster.hostfile import Host
from irpe_ds.cluster.preflight import Finding, faults, table
from irpe_ds.errors import ClusterError

HOSTS = [Host("a", 8), Host("b", 8), Host("c", 8), Host("d", 8)]
FACTS = {SOURCE: "12ab (commit 9f)", "the attention op": "fused"}
FOUND = [
    Finding(FACTS, "eth0", 8),
    Finding(FACTS, "eth0", 7),
    ClusterError("c", "an answer over ssh", "nothing"),
    Finding(FACTS | {"the attention op": "gather"}, None, 8),
]


def test_every_fault_is_told_by_host() -> None:
    assert [str(fault) for fault in faults(HOSTS, FOUND)] == [
        "c: expected an answer over ssh, got nothing",
        "b: expected 8 GPUs, its slots, got 7 free ones",
        "d: expected the attention op fused, as a has, got gather",
    ]
    on_processors = [Finding(FACTS, "eth0", None)] * 4
    assert faults(HOSTS, on_processors) == []


def test_a_line_for_each_host() -> None:
    lines = [line.split() for line in table(HOSTS, FOUND).splitlines()]
    assert lines[2] == ["b", "8", "7", "eth0", "fused", "12ab", "(commit", "9f)"]
    assert lines[3] == ["c", "8", "?", "?", "?", "?"]
    assert lines[4][3:5] == ["none", "gather"]
