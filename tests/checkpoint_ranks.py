"""Checkpoints without a run: ranks that are threads of one process write them."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from irpe_ds.checkpoint.reader import CheckpointManifest
from irpe_ds.checkpoint.shards import Shard
from irpe_ds.checkpoint.writer import CheckpointWriter
from irpe_ds.cluster.process_group import Ranks

Result = TypeVar("Result")


class _ThreadRanks(Ranks):
    """A rank that is a thread."""

    def all_gather(self, value: Any) -> list[Any]:
        barrier, values = self.cpu_group
        values[self.rank] = value
        barrier.wait(60)
        gathered = list(values)
        barrier.wait(60)
        return gathered

    def on_rank0(self, function: Callable[[], Any]) -> Any:
        return self.all_gather(self.run_checked(function if self.is_main else lambda: None))[0]


def on_ranks(world_size: int, function: Callable[[Ranks], Result]) -> list[Result]:
    """Call a function on every rank; its results by rank."""
    group = Barrier(world_size), [None] * world_size
    ranks = [
        _ThreadRanks(
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            cpu_group=group,
            hostnames=["here"] * world_size,
        )
        for rank in range(world_size)
    ]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(function, ranks))


SOLO = Ranks(rank=0, world_size=1, device=torch.device("cpu"), cpu_group=None, hostnames=["here"])


def save(
    folder: Path,
    manifest: CheckpointManifest,
    state: Mapping[str, Mapping[str, Tensor]],
    *,
    keep: int = 1,
    world_size: int = 1,
) -> CheckpointManifest:
    """Save tensors by kind and name, a part of each by every rank."""

    def write(ranks: Ranks) -> CheckpointManifest | None:
        shards = {}
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                parts = tensor.flatten().tensor_split(world_size)
                start = sum(part.numel() for part in parts[: ranks.rank])
                shards[f"{kind}.{name}"] = Shard(start, parts[ranks.rank])
        writer = CheckpointWriter(folder, ranks, keep)
        writer.start(replace(manifest, ema="ema" in state), shards)
        return writer.finish()

    saved = on_ranks(world_size, write)[0]
    assert saved is not None
    return saved
