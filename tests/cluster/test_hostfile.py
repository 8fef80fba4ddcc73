"""Hosts and slots, and the mistakes in a hostfile."""

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
    path.write_text("\n# all\n10.0.0.2\tslots=1 # the first\n\nme@b.example  slots=12\n")
    assert read_hostfile(path) == [("10.0.0.2", 1), ("me@b.example", 12)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\na slots=2\n", "hosts, line 2: expected every host once, got a again"),
        ("a slots=0\n", "hosts, line 1: expected at least one slot"),
        ("# none\na\n", "hosts, line 2: expected NAME slots=NUMBER, got 'a'"),
        ("a slots=-1\n", "expected NAME slots=NUMBER"),
        ("a slots=4x\n", "got 'a slots=4x'"),
        ("a slots = 4\n", "got 'a slots = 4'"),
        ("# none\n", "hosts: expected at least one line NAME slots=NUMBER, got none"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ClusterError) as caught:
        read_hostfile(tmp_path / "hosts")
    assert message in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"expected a hostfile, got .*No such file"):
        read_hostfile(tmp_path / "nowhere")
