"""The ranks of a run: how many there are, which one this is, and its device."""

import ctypes
import os
import resource
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    """This rank, and collectives over all ranks of the run."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any
    """A gloo process group: its collectives use host memory and do not wait for a GPU."""
    hostnames: list[str]
    """Host of every rank."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(found)

    def all_gather(self, value: Result) -> list[Result]:
        """The values of all ranks, by rank; any picklable object."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def run_checked(self, function: Callable[[], Result]) -> Result:
        """Call a function on every rank.

        Raises:
            UserError: on every rank, if it raised one on any; of the same class. Ranks on which it
                succeeded name the rank on which it failed.
        """
        result, error = None, None
        try:
            result = function()
        except UserError as raised:
            error = raised
        errors = self.all_gather(error)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                where = f"rank {rank} on {self.hostnames[rank]}: {other.where}"
                raise type(other)(where, other.expected, other.got)
        return cast(Result, result)

    def on_rank0(self, function: Callable[[], Result]) -> Result:
        """Call a function on rank 0 alone; all ranks return its result or raise its UserError."""
        if self.world_size == 1:
            return function()
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

    def on_rank0_at_length(self, function: Callable[[], Result]) -> Result:
        """The same for what may take longer than COLLECTIVE_TIMEOUT: the others ask every minute.

        The function runs in a thread.
        """
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function) if self.is_main else None
            self._wait_for_all(future)
            return self.on_rank0(lambda: cast(Future[Result], future).result())

    def run_at_length(self, function: Callable[[], Result]) -> Result:
        """`run_checked` for what may take as long; likewise in threads."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function)
            self._wait_for_all(future)
            return self.run_checked(future.result)

    def _wait_for_all(self, future: Future[Result] | None) -> None:
        while self.any_rank(future is not None and bool(wait([future], 60).not_done)):
            pass


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective ended because another rank did: gloo's errors have no class."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return is_gloo or isinstance(error, dist.DistError)


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a rank that is alive: longer than anything that one rank does
while the others wait, such as compiling operators. The heartbeat reports dead ranks much sooner."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), in bytes."""
CONNECTIONS, OTHER_FILES = 8, 1024
"""Connections of every rank to rank 0: the heartbeat, the wait for a stop, PyTorch's store and room
for its clones, one for each NCCL group; and what else a process opens."""


def set_environment() -> None:
    """Set PyTorch's variables that the launcher has not set; without a launcher, for one rank.

    Raises:
        ClusterError: several processes were started by something that does not number them, or by
            `deepspeed` with a hostfile that does not exist or is malformed.
    """
    if not torch.cuda.is_available():
        # Without it DeepSpeed 0.19.8 warns on every rank that it found no accelerator. Remove this
        # when `import deepspeed` is silent on a machine without a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # gloo connects ranks when they first exchange something: not each with all, at 4,096 too.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    launchers.check_hostfile(launchers.parent_commands())
    os.environ.update(launchers.rank_environment(os.environ))
    if "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task shows each task only its own GPU
    return_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))


def return_freed_memory() -> None:
    """Make glibc give blocks of a MiB and more back as soon as they are freed; elsewhere nothing.

    By default it raises that bound, first 128 KiB, to the largest block freed so far, up to 32 MiB,
    and keeps what lies between blocks that stay: two ranks with 302 M parameters in fp32 and ZeRO-3
    then took 6.3 GB each up to the first update, and take 4.8 GB with this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)  # as by default after blocks of 32 MiB


def allow_connections(world_size: int) -> None:
    """Raise the limit of open files, often 1,024, as far as rank 0's stores need it and may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, OTHER_FILES + CONNECTIONS * world_size)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def rank_and_world_size() -> tuple[int, int]:
    """This rank and the number of ranks, from the environment."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def device_type() -> str:
    """`cuda`, or `cpu` without a GPU or if DS_ACCELERATOR says so."""
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return "cuda" if gpu else "cpu"


def init_process_group(seconds: float) -> Ranks:
    """Connect to the other ranks: nccl with GPUs, gloo without. DeepSpeed uses this group too.

    Args:
        seconds: how long to wait for the others.

    Raises:
        ClusterError: on all ranks, if one is missing or cannot take part; names its host.
    """
    rank, world_size = rank_and_world_size()
    allow_connections(world_size)
    gpu, local = device_type() == "cuda", int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if not dist.is_initialized():
        error = None
        if gpu and local >= torch.cuda.device_count():
            where = f"rank {rank} on {socket.gethostname()}"
            expected = f"a GPU for each of the host's {os.environ['LOCAL_WORLD_SIZE']} ranks"
            error = ClusterError(where, expected, torch.cuda.device_count())
        store = rendezvous(rank, world_size, seconds, error)
        store.set_timeout(COLLECTIVE_TIMEOUT)
        if gpu:
            torch.cuda.set_device(device)
        # DeepSpeed 0.19.8 calls collectives that torch 2.14 has renamed, and every rank would warn.
        # Can go when `make quickstart` prints no FutureWarning without it.
        warnings.filterwarnings("ignore", ".*torch.distributed.*deprecated", FutureWarning)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if gpu else None,
        )
    cpu_group: Any = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    hostnames: list[Any] = [None] * world_size
    dist.all_gather_object(hostnames, socket.gethostname(), group=cpu_group)
    return Ranks(
        rank=rank, world_size=world_size, device=device, cpu_group=cpu_group, hostnames=hostnames
    )


def disable_shm_allreduce() -> None:
    """Keep DeepSpeed 0.19.8 from its shared-memory all-reduce for inference on CPUs.

    Otherwise the first run compiles it (about 50 s), and every run leaves 66 MB per rank in
    /dev/shm. Remove this when tests/launch/test_train.py passes without it: it tests for both.
    """
    if device_type() == "cpu":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def destroy_process_group() -> None:
    """Close the connections that `init_process_group` opened, if it was called."""
    if dist.is_initialized():
        dist.destroy_process_group()
