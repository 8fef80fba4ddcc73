"""What the launcher says: how many ranks there are, which one this is, where the others run.

DeepSpeed's launcher and torchrun set PyTorch's variables; Open MPI and srun set their own.
"""

import base64
import contextlib
import errno
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
        ClusterError: several processes or tasks, and nothing that numbers them; or a variable that
            is not the number that it has to be.
    """
    if "RANK" in environment:
        missing = [name for name in TORCH if name not in environment]
        if missing:
            raise ClusterError(f"the launcher set RANK but not {', '.join(missing)}")
        found = {}
    elif _number(environment, OPEN_MPI["WORLD_SIZE"], "1") > 1:
        found = _open_mpi(environment)
    elif _is_step(environment) and _num_tasks(environment) > 1:
        found = _slurm(environment)
    else:
        for variable in () if _is_step(environment) else ("SLURM_NTASKS", "PMI_SIZE"):
            if _number(environment, variable, "1") > 1:
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
    _check_numbers({**environment, **found})
    return found


def check_launch(environment: Mapping[str, str]) -> None:
    """Check what the launcher says; fast, for a script to call before imports that take seconds.

    Raises:
        ClusterError: of `rank_environment`, or this is rank 0 and the port of its store is taken.
    """
    found = {**environment, **rank_environment(environment)}
    if found["RANK"] == "0" and not serves_store(environment):
        try:
            with socket.socket() as trial:  # as PyTorch's, which old connections do not hinder
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("", int(found["MASTER_PORT"])))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise port_error(found["MASTER_PORT"], error.strerror) from None


def serves_store(environment: Mapping[str, str]) -> bool:
    """Whether the launcher serves PyTorch's store itself, as torchrun's agent does."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def port_error(port: object, reason: object) -> ClusterError:
    """Rank 0 cannot serve its store at this port."""
    other = "take another with deepspeed's --master_port, or MASTER_PORT"
    where = f"MASTER_PORT on {socket.gethostname()}"
    return ClusterError(where, "a free port", f"{port}: {reason}; {other}")


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


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    """The value of a launcher's variable, a whole number."""
    text = environment.get(name, default)
    if text is None or re.fullmatch("[0-9]{1,10}", text) is None:
        got = "nothing" if text is None else repr(text[:100])
        raise ClusterError(name, "a whole number", got)
    return int(text)


def _check_numbers(environment: Mapping[str, str]) -> None:
    """Check PyTorch's variables, all of which are set."""
    world_size, port = (_number(environment, name) for name in ("WORLD_SIZE", "MASTER_PORT"))
    if not 0 < port < 1 << 16:
        raise ClusterError("MASTER_PORT", "a port between 1 and 65535", port)
    if _number(environment, "LOCAL_WORLD_SIZE") == 0:
        raise ClusterError("LOCAL_WORLD_SIZE", "at least 1", 0)
    for name in ("RANK", "LOCAL_RANK"):
        if _number(environment, name) >= world_size:
            got = f"WORLD_SIZE={world_size}"
            raise ClusterError(f"{name}={environment[name]}", "a larger WORLD_SIZE", got)


def _open_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: str(_number(environment, theirs)) for name, theirs in OPEN_MPI.items()}
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
        "RANK": str(_number(environment, "SLURM_PROCID")),
        "WORLD_SIZE": str(_num_tasks(environment)),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(counts[_node(environment, len(counts))]),
    }
    if "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = "127.0.0.1" if len(counts) == 1 else _nodes(environment)[0]
    if "MASTER_PORT" not in environment:
        job, step = (_number(environment, f"SLURM_{name}_ID") for name in ("JOB", "STEP"))
        found["MASTER_PORT"] = str(10_000 + (64 * job + step) % 20_000)
    return found


def _is_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, not the shell of sbatch or salloc."""
    return _number(environment, "SLURM_STEP_ID", str(MAX_NORMAL_STEP_ID)) < MAX_NORMAL_STEP_ID


def _num_tasks(environment: Mapping[str, str]) -> int:
    step = "SLURM_STEP_NUM_TASKS"
    return _number(environment, step if step in environment else "SLURM_NTASKS", "1")


def _node(environment: Mapping[str, str], count: int) -> int:
    """Number of this node, of so many."""
    node = _number(environment, "SLURM_NODEID")
    if node >= count:
        raise ClusterError("SLURM_NODEID", f"less than {count}, the nodes of the step", node)
    return node


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """`2(x3),1` is 2, 2, 2, 1."""
    step, job = "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
    text = environment.get(step) or environment.get(job, "")
    part = r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?"
    if re.fullmatch(f"{part}(?:,{part})*", text) is None:
        raise ClusterError(step if environment.get(step) else job, "counts such as 2(x3),1", text)
    found = re.findall(part, text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _nodes(environment: Mapping[str, str]) -> list[str]:
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(
            f"cannot list the job's nodes with scontrol ({error}): "
            "set MASTER_ADDR to the host of rank 0"
        ) from error
    return done.stdout.split()
