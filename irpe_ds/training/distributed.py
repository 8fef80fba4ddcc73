"""The ranks of a run: how many, which one is this, and what device it computes on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.training import launchers

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    hosts: Any
    """Process group of the processors: what it carries waits for no GPU."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that logs and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on one of the ranks."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.hosts)
        return bool(found)

    def gather(self, found: Result) -> list[Result]:
        """What every rank has found, by rank; all ranks get it."""
        all_found: list[Any] = [None] * self.world_size
        dist.all_gather_object(all_found, found, group=self.hosts)
        return all_found

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first rank alone; its result, or its ConfigError, on all."""
        box: list[Any] = [None]
        if self.is_first:
            try:
                box[0] = function()
            except ConfigError as error:
                box[0] = error
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        if isinstance(box[0], ConfigError):
            raise box[0]
        return box[0]


def set_environment() -> None:
    """Complete what the launcher set; without one, a run of one rank.

    Raises:
        ConfigError: several processes were started by something that does not number them.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(launchers.numbers(os.environ))
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


def join() -> Ranks:
    """Connect to the other ranks: nccl with GPUs, gloo without. DeepSpeed takes this group over."""
    gpu = device_type() == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    hosts = dist.new_group(backend="gloo")
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device, hosts=hosts)


def leave() -> None:
    """Close the connections of `join`, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
