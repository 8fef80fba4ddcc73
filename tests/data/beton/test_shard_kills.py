"""Processes of two hosts write a sharded data set, are killed, and its bytes are the same.

IRPE_KILLS=10 kills each of the four ten times, of 20,000 images.
"""

import ctypes
import io
import os
import shutil
import socket
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from irpe_ds.data.beton import claims
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.shards import convert_shards
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.verify import verify
from tests.forks import start

pytestmark = [pytest.mark.dist, pytest.mark.thorough]

KILLS = int(os.environ.get("IRPE_KILLS", "0"))
HOSTS = ("node1", "node1", "node2", "node2")
NEW_NETWORK, NEW_NAME = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small JPEGs, each of its own bytes: a comment is its number."""
    root, rng, jpegs = tmp_path_factory.mktemp("kills") / "source", np.random.default_rng(0), []
    for size in range(20, 40):
        made = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (size, 60 - size, 3), np.uint8)).save(made, "JPEG")
        jpegs.append(made.getvalue())
    for label in range(50):
        (root / f"{label:02d}").mkdir(parents=True)
    for number in range(20_000 if KILLS else 600):
        jpeg, comment = jpegs[number % 20], b"\xff\xfe\x00\x0a%08d" % number
        path = root / f"{number % 50:02d}" / f"{number:05d}.jpg"
        path.write_bytes(jpeg[:2] + comment + jpeg[2:])
    return root


def work(folder: Path, host: str, num_shards: int) -> None:
    """A process of a host: with a name and, where that is permitted, a network of its own."""
    os.chdir(folder)
    if ctypes.CDLL(None).unshare(NEW_NETWORK | NEW_NAME) == 0:
        socket.sethostname(host)
    claims._machine = lambda: host  # processes of one host know each other's numbers
    claims.BEAT_SECONDS, claims.STALE_SECONDS, claims.POLL_SECONDS = 0.1, 1.0, 0.05
    images, out = open_source([Path("source")]), Path("set.beton")
    convert_shards(images, out, StorageOptions(check="header"), num_shards, workers=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("set*"))}


def cpu_seconds(process: ForkServerProcess) -> float:
    with suppress(psutil.NoSuchProcess):
        return float(sum(psutil.Process(process.pid).cpu_times()[:2]))
    return 0.0


@pytest.mark.parametrize("kills", [KILLS or 2])
def test_killed_again_and_again(source: Path, tmp_path: Path, kills: int) -> None:
    num_shards, rng = 64 if KILLS else 6, np.random.default_rng(0)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "source").symlink_to(source)
    one = start(work, tmp_path / "one", "node0", num_shards)
    spent = 0.0
    while one.is_alive():
        spent = max(spent, cpu_seconds(one))
        one.join(0.02)
    assert one.exitcode == 0
    expected, many = contents(tmp_path / "one"), tmp_path / "many"
    verify(tmp_path / "one/set.beton", workers=1)
    done, taken = [0] * 4, 0
    processes: list[ForkServerProcess | None] = [None] * 4
    limits = [0.0] * 4
    while True:
        for slot, host in enumerate(HOSTS):
            process = processes[slot]
            if process is None:
                processes[slot] = start(work, many, host, num_shards)
                limits[slot] = rng.uniform(0.02, spent / 3)
            elif not process.is_alive():
                break  # the set is complete
            elif done[slot] < kills and cpu_seconds(process) > limits[slot]:
                process.kill()
                process.join()
                processes[slot], done[slot] = None, done[slot] + 1
        else:
            time.sleep(0.005)
            continue
        for process in processes:
            if process is not None:
                process.join()
                assert process.exitcode == 0
        assert contents(many) == expected
        taken += 1
        if min(done) >= kills:
            break
        processes = [None] * 4
        for path in many.glob("set*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{sum(done)} kills in {taken} conversions of {spent:.1f} s of processor time")
