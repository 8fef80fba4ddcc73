"""The training metrics of a log row: loss, speed, time waiting for data, memory."""

import resource
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.data.loaders import Batch


class Meter:
    """Adds up loss, images and time spent waiting for data between two log rows.

    The loss is summed on the device; only `read` and `save` synchronise with it. Sums of fp32
    losses in fp64 are exact, so a row does not depend on where a run was interrupted. A loss that
    is not finite is skipped, as its update is.

    Args:
        saved: what `save` returned in the run that this one continues.
    """

    def __init__(self, ranks: Ranks, saved: Mapping[str, float]) -> None:
        self.ranks = ranks
        self.sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        if saved and ranks.is_main:
            self.sums += self.sums.new_tensor([saved["loss"], saved["passes"]])
        self.start_clock()

    def start_clock(self) -> None:
        """Restart the measurement of speed."""
        self.images = self.updates = 0
        self.waited, self.since = 0.0, time.perf_counter()

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def add(self, loss: Tensor, images: int) -> None:
        """Add a forward pass of this rank."""
        finite = torch.isfinite(loss)
        self.sums += torch.stack([torch.where(finite, loss, 0.0).double(), finite.double()])
        self.images += images

    def save(self) -> dict[str, float]:
        """The sums over all ranks since the last row; all ranks call it."""
        loss, passes = self.ranks.all_reduce_sum(self.sums.clone()).tolist()
        return {"loss": loss, "passes": passes}

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last call, and a reset; all ranks call it."""
        sums = self.save()
        seconds = time.perf_counter() - self.since
        row = {
            "loss": sums["loss"] / sums["passes"] if sums["passes"] else float("nan"),
            "images_per_s": self.images * self.ranks.world_size / seconds,
            "step_ms": 1000 * seconds / max(1, self.updates),
            "data_wait": self.waited / seconds,
            "memory_gib": peak_memory(self.ranks.device) / 2**30,
        }
        self.sums.zero_()
        self.start_clock()
        return row


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
