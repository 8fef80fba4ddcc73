"""What the launcher says: how many ranks there are, which one this is, where the others run.

DeepSpeed's launcher and torchrun set PyTorch's variables; Open MPI and srun set their own.
"""

import base64
import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from irpe_ds.cluster.hostfile import read_hostfile
from irpe_ds.errors import ClusterError, UserError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""PyTorch's variables, all of which a run needs."""
OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
MAX_NORMAL_STEP_ID = 0xFFFFFFF0
"""slurm.h's name: batch scripts and interactive shells have step ids from here on."""


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """PyTorch's variables that the launcher has not set; without a launcher, a run of one rank.

    mpirun inside a SLURM job counts as mpirun. SLURM_NTASKS alone means a job whose tasks were
    never started: no launcher.

    Raises:
        ClusterError: several processes or tasks, and nothing that numbers them.
    """
    if "RANK" in environment:
        missing = [name for name in TORCH if name not in environment]
        if missing:
            raise ClusterError(f"the launcher set RANK but not {', '.join(missing)}")
        found = {}
    elif int(environment.get(OPEN_MPI["WORLD_SIZE"], "1")) > 1:
        found = _open_mpi(environment)
    elif _is_step(environment) and _num_tasks(environment) > 1:
        found = _slurm(environment)
    else:
        for variable in () if _is_step(environment) else ("SLURM_NTASKS", "PMI_SIZE"):
            if int(environment.get(variable, "1")) > 1:
                single = " (srun -n 1 for a single rank)" if variable == "SLURM_NTASKS" else ""
                raise ClusterError(
                    f"{variable}={environment[variable]}, but nothing numbers the ranks: start "
                    f"them with srun, deepspeed, torchrun or Open MPI's mpirun{single}"
                )
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if "LOCAL_WORLD_SIZE" not in environment:
        # DeepSpeed 0.19.8's launcher calls it LOCAL_SIZE; torchrun sets LOCAL_WORLD_SIZE.
        found.setdefault("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
    return found


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def hosts_of_ranks(environment: Mapping[str, str], launcher: Sequence[str]) -> list[str] | None:
    """The host that each rank should run on; None if the launcher does not say.

    Args:
        launcher: command line of the parent process; DeepSpeed's has the hosts in --world_info.
    """
    for value in option_values(launcher, "--world_info"):
        slots = json.loads(base64.urlsafe_b64decode(value))
        return [host for host, local_ranks in slots.items() for _ in local_ranks]
    block = environment.get("SLURM_DISTRIBUTION", "block").startswith("block")
    if _is_step(environment) and _num_tasks(environment) > 1 and block:
        try:
            nodes = _nodes(environment)
        except UserError:
            return None
        counts = _tasks_per_node(environment)
        return [node for node, count in zip(nodes, counts, strict=True) for _ in range(count)]
    return None


def check_hostfile(launchers: Sequence[Sequence[str]]) -> None:
    """Read the hostfile of the `deepspeed` command, if it was given one.

    DeepSpeed 0.19.8 only warns if the file does not exist, and trains on this host alone. Remove
    this check when its runner fails instead.

    Args:
        launchers: command lines of the processes that started this one.

    Raises:
        ClusterError: it does not exist or is malformed.
    """
    for command in launchers:
        names = [Path(word).name for word in command[:2]]
        if "deepspeed" in names:
            for value in option_values(command, "--hostfile", "-H"):
                read_hostfile(Path(value))


def option_values(command: Sequence[str], *names: str) -> Iterator[str]:
    """Values of an option in a command line, as `--name value` or `--name=value`."""
    for word, following in zip(command, [*command[1:], ""], strict=False):
        if word in names:
            yield following
        elif word.startswith(tuple(f"{name}=" for name in names)):
            yield word.split("=", 1)[1]


def parent_commands() -> list[list[str]]:
    """Command lines of the processes that started this one, the nearest first."""
    found = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            found.append(process.cmdline())
    return found


def _open_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: environment[theirs] for name, theirs in OPEN_MPI.items()}
    if "MASTER_ADDR" not in environment:
        if found["LOCAL_WORLD_SIZE"] != found["WORLD_SIZE"]:
            raise ClusterError(
                "Open MPI on several hosts needs the host of rank 0: mpirun -x MASTER_ADDR=HOST"
            )
        found["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        found["MASTER_PORT"] = "29500"
    return found


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    counts = _tasks_per_node(environment)
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(_num_tasks(environment)),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environment["SLURM_NODEID"])]),
    }
    if "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = "127.0.0.1" if len(counts) == 1 else _nodes(environment)[0]
    if "MASTER_PORT" not in environment:
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        found["MASTER_PORT"] = str(10_000 + (64 * job + step) % 20_000)
    return found


def _is_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, not the shell of sbatch or salloc."""
    return int(environment.get("SLURM_STEP_ID", MAX_NORMAL_STEP_ID)) < MAX_NORMAL_STEP_ID


def _num_tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """`2(x3),1` is 2, 2, 2, 1."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = environment.get(name) or environment["SLURM_TASKS_PER_NODE"]
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _nodes(environment: Mapping[str, str]) -> list[str]:
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(
            f"cannot list the job's nodes with scontrol ({error}): "
            "set MASTER_ADDR to the host of rank 0"
        ) from error
    return done.stdout.split()
