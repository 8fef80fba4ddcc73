"""Several hosts train as one: pdsh over ssh, ZeRO over a network, the death of a host."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.launch.hosts import Hosts, missing, python_environment
from tests.launch.ranks import Ranks, rows

REASON = missing()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]
slow = pytest.mark.slow
MORE = [(2, 2), (2, 3), (4, 1), (4, 2), (4, 3)]
ROOT = Path(__file__).parents[2]
UPDATES = 20


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Five hosts; on the last lies another commit of this repository."""
    other = tmp_path_factory.mktemp("other")
    git = ("git", "-C", other, "-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run(["git", "clone", "-q", ROOT, other], check=True)
    with (other / "irpe_ds/training/metrics.py").open("a") as file:
        file.write("# another\n")
    subprocess.run([*git, "commit", "-qam", "Another"], check=True)
    (other / ".venv").mkdir()
    mounts = {"node5": [(Path(sys.prefix), other / ".venv"), (other, ROOT)]}
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(folder, 5, python_environment(), mounts) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def common(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"output={tmp_path_factory.mktemp('cluster')}",
        *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton", "data.workers=1"),
        *("train.epochs=3", "train.global_batch=96", "train.log_every=1", "train.precision=fp32"),
        *(f"train.max_updates={UPDATES}", "train.save_every=5", "model.options.depth=2"),
        *("optim.warmup_epochs=1", "optim.lr=1e-3", "optim.eps=1e-4"),
    ]


def launch(
    hosts: Hosts,
    names: list[str],
    overrides: list[str],
    resume: str = "never",
    options: Sequence[str] = (),
) -> "tuple[subprocess.Popen[bytes], Path]":
    """deepspeed on node1, over these hosts; its process and its log."""
    config = ("--config", "launch/configs/quickstart.yaml", "--resume", resume)
    command = ["deepspeed", "--hostfile", hosts.hostfile(names), *options, "launch/train.py"]
    log = hosts.folder / f"log-{time.monotonic_ns()}"
    return hosts.start([*command, *config, *overrides], log), log


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in rows(folder, "train")], dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "stage"), [(2, 1), *(pytest.param(*case, marks=slow) for case in MORE)]
)
def test_hosts_train_as_one(
    count: int, stage: int, hosts: Hosts, common: list[str], tmp_path: Path
) -> None:
    output = Path(common[0].removeprefix("output="))
    run = [*common, f"train.deepspeed=ds_configs/zero{stage}.json"]
    process, log = launch(hosts, hosts.names[:count], [*run, f"name=hosts-{count}-{stage}"])
    assert process.wait(600) == 0, log.read_text()
    Ranks(tmp_path, count, [([*run, f"name=ranks-{count}-{stage}"], "never")]).succeed()
    found, expected = (losses(output / f"{kind}-{count}-{stage}") for kind in ("hosts", "ranks"))
    assert len(found) == UPDATES
    assert f"{count} nodes over eth0" in log.read_text()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@slow
def test_a_checkpoint_of_four_hosts_goes_on_with_two(
    hosts: Hosts, common: list[str], tmp_path: Path
) -> None:
    output = Path(common[0].removeprefix("output="))
    run = [*common, "name=fewer"]
    process, log = launch(hosts, hosts.names[:4], [*run, "train.max_updates=10"])
    assert process.wait(600) == 0, log.read_text()
    process, log = launch(hosts, hosts.names[:2], run, "auto")
    assert process.wait(600) == 0, log.read_text()
    assert "with ranks: 4 -> 2" in log.read_text()
    Ranks(tmp_path, 4, [([*common, "name=whole"], "never")]).succeed()
    found, expected = (losses(output / name) for name in ("fewer", "whole"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


LONG = ("train.epochs=2000", "train.max_updates=20000", "train.log_every=20", "train.save_every=50")


def wait_for_checkpoints(folder: Path, number: int, log: Path) -> None:
    """Until a run has saved so often."""
    end = time.monotonic() + 600
    while len(list(folder.glob("checkpoints/update-*"))) < number:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


@slow
def test_a_link_that_is_cut_for_half_a_minute_costs_only_the_time(
    hosts: Hosts, common: list[str]
) -> None:
    folder = Path(common[0].removeprefix("output=")) / "cut"
    long = [*LONG, "train.max_updates=400", "train.keep_checkpoints=9"]
    process, log = launch(hosts, hosts.names[:2], [*common, *long, "name=cut"])
    wait_for_checkpoints(folder, 2, log)
    hosts.link("node2", "down")
    time.sleep(30)
    assert process.poll() is None
    assert not (folder / "checkpoints/update-00000400").exists()
    hosts.link("node2", "up")
    assert process.wait(600) == 0, log.read_text()
    assert (folder / "checkpoints/update-00000400").exists()


@slow
def test_a_signal_to_the_command_saves(hosts: Hosts, common: list[str]) -> None:
    """Over pdsh it tells the hosts, and does not wait for them."""
    folder = Path(common[0].removeprefix("output=")) / "asked"
    process, log = launch(hosts, hosts.names[:2], [*common, *LONG, "name=asked"])
    wait_for_checkpoints(folder, 1, log)
    process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 600
    while all(path.name.endswith(("00", "50")) for path in folder.glob("checkpoints/update-*")):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    assert process.wait(600) != 0


@slow
def test_a_host_that_does_not_answer_is_named(hosts: Hosts, common: list[str]) -> None:
    process, log = launch(hosts, ["node1", "absent", "node2"], [*common, "name=absent"])
    assert process.wait(600) != 0
    assert "error: rank 1 on absent did not join within 45 s" in log.read_text()


@slow
def test_a_host_with_another_commit_is_named(hosts: Hosts, common: list[str]) -> None:
    process, log = launch(hosts, ["node1", "node5"], [*common, "name=commits"])
    assert process.wait(600) != 0
    found = re.search(
        r"error: (.*) \(commit (.*)\), as (.*) has, got .* \(commit (.*)\)", log.read_text()
    )
    assert found is not None, log.read_text()
    assert found[1].startswith("rank 1 on node5: expected the source of irpe_ds")
    assert found[3] == "rank 0 on node1"
    assert found[2] != found[4]


@slow
def test_the_check_before_a_run_names_every_fault(hosts: Hosts, common: list[str]) -> None:
    config = ("--config", "launch/configs/quickstart.yaml", *common)
    log = hosts.folder / "check"

    def check(*names: str) -> tuple[int, str]:
        hostfile = hosts.hostfile(names)
        process = hosts.start(["python", "launch/check.py", "--hostfile", hostfile, *config], log)
        return process.wait(600), log.read_text()

    code, output = check("node1", "node2")
    assert code == 0, output
    assert re.search(r"^node1 +1 +- +lo +cpu +\w+ \(commit", output, re.MULTILINE)
    assert re.search(r"^node2 +1 +- +eth0 +cpu +\w+ \(commit", output, re.MULTILINE)
    code, output = check("node1", "node2", "absent", "node5")
    assert code == 2
    (absent, other) = (line for line in output.splitlines() if line.startswith("error: "))
    assert absent.startswith("error: absent: expected an answer over ssh")
    assert other.startswith("error: node5: expected the source of irpe_ds")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (openmpi-bin)")
@slow
def test_hosts_train_with_open_mpi(
    hosts: Hosts, common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(variable, "1")
    options = ("--launcher", "openmpi", "--launcher_args=-x MASTER_ADDR=node1")
    process, log = launch(hosts, hosts.names[:2], [*common, "name=mpi"], options=options)
    assert process.wait(600) == 0, log.read_text()
    assert "2 ranks on CPU, 2 nodes over eth0" in log.read_text()


@slow
def test_a_host_that_dies_ends_the_run_by_name(hosts: Hosts, common: list[str]) -> None:
    """The last test of this file: node2 is gone after it."""
    folder = Path(common[0].removeprefix("output=")) / "dying"
    run = [*common, *LONG, "name=dying"]
    process, log = launch(hosts, hosts.names[:2], run)
    wait_for_checkpoints(folder, 2, log)
    hosts.tear_down("node2")
    assert process.wait(600) != 0
    assert "error: rank 1 on node2 has not answered for 40 s" in log.read_text()
    updates = max(int(p.name[-8:]) for p in (folder / "checkpoints").glob("update-*"))
    more = f"train.max_updates={updates + 10}"
    process, log = launch(hosts, ["node1", "node3"], [*run, more], "auto")
    assert process.wait(600) == 0, log.read_text()
    assert f"resuming from {folder}" in log.read_text()
