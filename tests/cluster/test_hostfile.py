"""Hosts and slots, and the mistakes in a hostfile."""

import os
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from irpe_ds.cluster.hostfile import read_hostfile
from irpe_ds.errors import ClusterError

EXAMPLE = Path(__file__).parents[2] / "launch/hostfile.example"


def test_the_example_is_what_deepspeed_reads() -> None:
    assert read_hostfile(EXAMPLE) == [("node1", 8), ("node2", 8)]
    assert list(fetch_hostfile(str(EXAMPLE)).items()) == read_hostfile(EXAMPLE)


def test_what_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("\n# all\n10.0.0.2\tslots=1 # the first\r\n\nme@b_1.example  slots=12\n")
    assert read_hostfile(path) == [("10.0.0.2", 1), ("me@b_1.example", 12)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\na slots=2\n", "hosts, line 2: expected every host once, got a again"),
        ("a slots=0\n", "hosts, line 1: expected at least one slot"),
        ("# none\na\n", "hosts, line 2: expected NAME slots=NUMBER, got 'a'"),
        ("a slots=-1\n", "expected NAME slots=NUMBER"),
        ("a slots=4x\n", "got 'a slots=4x'"),
        ("a slots = 4\n", "got 'a slots = 4'"),
        ("a slots=1\x0bb slots=2\n", "got 'a slots=1\\x0bb slots=2'"),
        ("a slots=\u0661\n", "expected NAME slots=NUMBER"),
        ("a slots=1000000000\n", "expected NAME slots=NUMBER"),
        (
            "a slots=4097\n",
            "hosts, line 1: expected at most 4096 slots, ranks on one host, got 4097",
        ),
        ("# none\n", "hosts: expected at least one line NAME slots=NUMBER, got none"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ClusterError) as caught:
        read_hostfile(tmp_path / "hosts")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "-oProxyCommand=x",
            "-l@a",
            "$(id)",
            "h[1-99999999]",
            "a;b",
            "a/b",
            "`id`",
            "a,b",
            "a:22",
        ),
        *("fe80::1", "a..b", ".a", "a-", "bücher.example", "@a", "a@", "a" * 64, "a." * 130 + "a"),
    ],
)
def test_a_host_has_the_name_of_a_host(name: str, tmp_path: Path) -> None:
    """DeepSpeed and check.py hand it to ssh, and pdsh expands brackets."""
    path = tmp_path / "hosts"
    path.write_text(f"node-1 slots=1\n{name} slots=1\n")
    with pytest.raises(ClusterError, match=r"hosts, line 2: expected the name of a host") as caught:
        read_hostfile(path)
    assert repr(name)[:50] in str(caught.value)


def test_a_hostfile_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hosts")
    for path in (tmp_path / "hosts", Path("/dev/zero"), tmp_path):
        with pytest.raises(ClusterError, match=r"expected a hostfile, got .*not a regular file"):
            read_hostfile(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"expected a hostfile, got .*No such file"):
        read_hostfile(tmp_path / "nowhere")
