"""Ranks by the variables of each launcher; who is alone, and who is asked for a launcher."""

import base64
import json
import socket
from pathlib import Path

import pytest

from irpe_ds.cluster.launchers import (
    check_hostfile,
    check_launch,
    hosts_of_ranks,
    rank_environment,
)
from irpe_ds.errors import ClusterError

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
TORCH |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
JOB = {"SLURM_JOB_ID": "1001", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "4"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[7-9]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[7-9]" ] && printf "gpu%s\\n" 7 8 9\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_pytorchs_variables_stay() -> None:
    assert rank_environment(TORCH | {"LOCAL_SIZE": "2"}) == {"LOCAL_WORLD_SIZE": "2"}
    assert rank_environment(TORCH | {"LOCAL_WORLD_SIZE": "2"}) == {}
    assert rank_environment(TORCH | JOB | OPEN_MPI) == {"LOCAL_WORLD_SIZE": "1"}


def test_a_variable_is_missing() -> None:
    del (some := dict(TORCH))["MASTER_ADDR"]
    with pytest.raises(ClusterError, match=r"set RANK but not MASTER_ADDR$"):
        rank_environment(some)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number, got 'two'"),
        ({"RANK": "-1"}, "RANK: expected a whole number, got '-1'"),
        ({"RANK": ""}, "RANK: expected a whole number, got ''"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK: expected a whole number"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: expected at least 1, got 0"),
        ({"LOCAL_SIZE": "9" * 5000}, "LOCAL_WORLD_SIZE: expected a whole number, got '999"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: expected a port between 1 and 65535, got 70000"),
        ({"RANK": "4"}, "RANK=4: expected a larger WORLD_SIZE, got WORLD_SIZE=4"),
        (OPEN_MPI | {"RANK": None, "OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE: expected"),
        (OPEN_MPI | {"RANK": None, "OMPI_COMM_WORLD_RANK": None}, "OMPI_COMM_WORLD_RANK: expected"),
        (STEP | {"RANK": None, "SLURM_STEP_ID": "x"}, "SLURM_STEP_ID: expected a whole number"),
        (STEP | {"RANK": None, "SLURM_NODEID": "3"}, "SLURM_NODEID: expected less than 3"),
        (STEP | {"RANK": None, "SLURM_PROCID": None}, "SLURM_PROCID: expected a whole number"),
        (
            STEP | {"RANK": None, "SLURM_STEP_TASKS_PER_NODE": "2(y2)"},
            "SLURM_STEP_TASKS_PER_NODE: expected counts such as 2(x3),1, got 2(y2)",
        ),
        ({"RANK": None, "PMI_SIZE": "many"}, "PMI_SIZE: expected a whole number, got 'many'"),
    ],
)
def test_a_variable_is_not_what_it_has_to_be(changes: dict[str, str | None], message: str) -> None:
    environment = {k: v for k, v in (TORCH | changes).items() if v is not None}
    with pytest.raises(ClusterError) as caught:
        rank_environment(environment)
    assert str(caught.value).startswith(message)


def test_the_port_is_taken_says_rank_0_at_once() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PyTorch does
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            first = TORCH | {"RANK": "0", "MASTER_PORT": str(port)}
            with pytest.raises(ClusterError) as caught:
                check_launch(first)
            check_launch(first | {"RANK": "1"})
            check_launch(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
            accepted, _ = taken.accept()
            accepted.close()  # this side closes first: its port is in TIME_WAIT
    assert str(caught.value) == (
        f"MASTER_PORT on {socket.gethostname()}: expected a free port, got {port}: Address already "
        "in use; take another with deepspeed's --master_port, or MASTER_PORT"
    )
    check_launch(first)


def test_open_mpi() -> None:
    found = rank_environment(OPEN_MPI | {"MASTER_ADDR": "node1"} | BATCH)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert found == expected | {"MASTER_PORT": "29500"}
    with pytest.raises(ClusterError, match="mpirun -x MASTER_ADDR"):
        rank_environment(OPEN_MPI)
    one_host = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert rank_environment(one_host)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.usefixtures("scontrol")
def test_srun() -> None:
    found = rank_environment(STEP)
    expected = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert found == expected | {"MASTER_ADDR": "gpu7", "MASTER_PORT": "14066"}
    assert rank_environment(STEP | {"SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "1"
    own = {"MASTER_ADDR": "ib-gpu7", "MASTER_PORT": "5"}
    assert rank_environment(STEP | own) == expected
    assert hosts_of_ranks(STEP, []) == ["gpu7", "gpu7", "gpu8", "gpu8", "gpu9"]
    assert hosts_of_ranks(STEP | {"SLURM_DISTRIBUTION": "cyclic"}, []) is None


def test_srun_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"scontrol.*MASTER_ADDR"):
        rank_environment(STEP)
    assert hosts_of_ranks(STEP, []) is None
    assert (
        rank_environment(STEP | {"SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"})["RANK"]
        == "3"
    )


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}])
def test_a_job_whose_tasks_nobody_started(step: dict[str, str]) -> None:
    with pytest.raises(ClusterError, match=r"^SLURM_NTASKS=4, .*srun -n 1 for a single rank"):
        rank_environment(BATCH | step)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH | {"SLURM_NTASKS": "1"},
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["no launcher", "one task", "a step of one in a job of four", "mpirun -n 1"],
)
def test_alone(environment: dict[str, str]) -> None:
    found = rank_environment(environment)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert int(found["MASTER_PORT"]) > 0


def test_mpich_is_not_known() -> None:
    with pytest.raises(ClusterError, match=r"^PMI_SIZE=2, but nothing numbers the ranks"):
        rank_environment({"PMI_SIZE": "2", "PMI_RANK": "1"})


def test_deepspeed_names_the_hosts() -> None:
    world = base64.urlsafe_b64encode(json.dumps({"a": [0, 1], "b": [0]}).encode()).decode()
    assert hosts_of_ranks({}, ["python", f"--world_info={world}"]) == ["a", "a", "b"]
    assert hosts_of_ranks({}, ["bash"]) is None


@pytest.mark.parametrize("option", [["--hostfile", "{}"], ["-H", "{}"], ["--hostfile={}"]])
def test_deepspeed_with_a_hostfile_that_is_not_there(option: list[str], tmp_path: Path) -> None:
    """It warns, and would train on this host alone."""
    path = tmp_path / "hosts"
    words = [word.format(path) for word in option]
    command = ["/env/bin/python", "/env/bin/deepspeed", *words, "launch/train.py"]
    with pytest.raises(ClusterError, match=r"expected a hostfile, got .*No such file"):
        check_hostfile([["python", "-m", "deepspeed.launcher.launch"], command])
    path.write_text("a slots=1\n")
    check_hostfile([command])
    path.write_text("a slots=0\n")
    with pytest.raises(ClusterError, match="at least one slot"):
        check_hostfile([command])
    check_hostfile([["bash", "-c", f"deepspeed --hostfile {path}"], ["mpirun", "--hostfile", "x"]])
