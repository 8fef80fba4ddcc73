"""A network that goes away, between two network namespaces of this machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import ENVIRONMENT
from tests.launch.ranks import CONFIG

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SPACES = [f"irpe{os.getpid()}-{end}" for end in "ab"]
ADDRESS = "10.78.0"


def call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    """Two network namespaces that are joined."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    try:
        for space in SPACES:
            call("ip", "netns", "add", space)
        ends = [("eth0", "netns", space) for space in SPACES]
        call("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, space in enumerate(SPACES, 1):
            inside = ("ip", "-n", space)
            call(*inside, "address", "add", f"{ADDRESS}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                call(*inside, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs network namespaces: {error.stderr.decode().strip()}")
    else:
        yield SPACES
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def test_each_end_names_the_other(
    spaces: list[str], common: list[str], output: Path, tmp_path: Path
) -> None:
    run = ["launch/train.py", "--config", CONFIG, *common, "name=cut"]
    run += ["train.epochs=2000", "train.max_updates=20000"]
    environment = os.environ | ENVIRONMENT | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": f"{ADDRESS}.1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    processes = []
    for rank, space in enumerate(spaces):
        with (tmp_path / str(rank)).open("w") as log:
            command = ["ip", "netns", "exec", space, sys.executable, *run]
            own = environment | {"RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stderr=log))
    try:
        end = time.monotonic() + 600
        while not (output / "cut/train.csv").exists():
            assert time.monotonic() < end
            time.sleep(0.2)
        call("ip", "-n", spaces[1], "link", "set", "eth0", "down")
        assert [process.wait(600) for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, other in enumerate((1, 0)):
        said = f"error: rank {other} on {socket.gethostname()} has not answered for 40 s"
        assert said in (tmp_path / str(rank)).read_text()
