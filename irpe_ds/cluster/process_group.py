"""The ranks of a run: how many, which one is this, and what device it computes on."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from irpe_ds.cluster import launchers
from irpe_ds.cluster.rendezvous import rendezvous
from irpe_ds.errors import ClusterError, UserError

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any
    """gloo process group: its collectives run on host memory and wait for no GPU."""
    hostnames: list[str]
    """Host of every rank."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.cpu_group)
        return cast(list[float], found.tolist())

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on one of the ranks."""
        return bool(self.all_reduce_max([flag])[0])

    def all_gather(self, found: Result) -> list[Result]:
        """What every rank has found, by rank; all ranks get it."""
        all_found: list[Any] = [None] * self.world_size
        dist.all_gather_object(all_found, found, group=self.cpu_group)
        return all_found

    def run_checked(self, function: Callable[[], Result]) -> Result:
        """Call a function on every rank; what is a ClusterError on one is one on all, by name."""
        result, fault = None, None
        try:
            result = function()
        except UserError as error:
            fault = error
        faults = self.all_gather(fault)
        if fault is not None:
            raise fault
        for rank, other in enumerate(faults):
            if other is not None:
                where = f"rank {rank} on {self.hostnames[rank]}: {other.where}"
                raise type(other)(where, other.expected, other.got)
        return cast(Result, result)

    def on_rank0(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first rank alone; its result, or its ClusterError, on all."""
        box: list[Any] = [None]
        if self.is_main:
            try:
                box[0] = function()
            except UserError as error:
                box[0] = error
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a rank that lives. It is longer than anything that one rank does
while the others wait, such as a build of the operators; ranks that do not live are named sooner."""


def set_environment() -> None:
    """Complete what the launcher set; without one, a run of one rank.

    Raises:
        ClusterError: several processes were started by something that does not number them, or by
            `deepspeed` with a hostfile that does not exist or has a mistake.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    launchers.check_hostfile(launchers.parents())
    os.environ.update(launchers.numbers(os.environ))
    if "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task shows each task its own GPU alone
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))


def launched() -> tuple[int, int]:
    """This rank and the number of ranks, as the launcher numbered them."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def device_type() -> str:
    """`cuda`, or `cpu` where there is no GPU or DS_ACCELERATOR says so."""
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return "cuda" if gpu else "cpu"


def init_process_group(seconds: float) -> Ranks:
    """Connect to the other ranks: nccl with GPUs, gloo without. DeepSpeed takes this group over.

    Args:
        seconds: how long to wait for the others.

    Raises:
        ClusterError: on all ranks: one has not come, or cannot take part; names its host.
    """
    rank, world_size = launched()
    gpu, local = device_type() == "cuda", int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if not dist.is_initialized():
        fault = None
        if gpu and local >= torch.cuda.device_count():
            where = f"rank {rank} on {socket.gethostname()}"
            got = f"{torch.cuda.device_count()} for {os.environ['LOCAL_WORLD_SIZE']}"
            fault = ClusterError(where, "a GPU for each rank of the host", got)
        store = rendezvous(rank, world_size, seconds, fault)
        store.set_timeout(COLLECTIVE_TIMEOUT)
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if gpu else None,
        )
    cpu_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    hostnames: list[Any] = [None] * world_size
    dist.all_gather_object(hostnames, socket.gethostname(), group=cpu_group)
    return Ranks(
        rank=rank, world_size=world_size, device=device, cpu_group=cpu_group, hostnames=hostnames
    )


def without_shared_memory() -> None:
    """Keep DeepSpeed from its all-reduce in shared memory, which is for inference, on CPUs.

    Its first run would compile it, and every run leave 66 MB a rank in /dev/shm for good.
    """
    if device_type() == "cpu":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def destroy_process_group() -> None:
    """Close the connections of `init_process_group`, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
