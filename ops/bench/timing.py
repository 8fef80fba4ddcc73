"""Timing side by side: every case once per round, so that noise affects all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

WARMUP = 2
MIN_MS = 5.0
"""On a GPU a call is repeated for at least this long, to hide launch time and clock resolution."""


class Timing(NamedTuple):
    """One case of a comparison."""

    median: float
    """Milliseconds."""
    ratio: float
    """To the baseline: the median over the rounds of the ratio within a round."""
    peak: float | None
    """MiB of GPU memory that a call takes beyond what was allocated before; None on the CPU."""


def compare(
    cases: Mapping[str, Callable[[], object]], baselines: tuple[str, ...], rounds: int
) -> dict[str, Timing]:
    """Time cases against the baseline with the smallest median, after two warm-up rounds.

    Args:
        cases: what to call, by name; on CUDA the time includes all kernels it starts.
        baselines: names among the cases.
    """
    measure = _GPUTimer() if torch.cuda.is_available() else _CPUTimer()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(WARMUP + rounds):
        for name, call in cases.items():
            elapsed = measure(name, call)
            if done >= WARMUP:
                times[name].append(elapsed)
    base = times[min(baselines, key=lambda name: statistics.median(times[name]))]
    return {
        name: Timing(
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, base, strict=True)),
            measure.peaks.get(name),
        )
        for name, own in times.items()
    }


class _CPUTimer:
    """Milliseconds of a call on the CPU."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class _GPUTimer(_CPUTimer):
    """Milliseconds of a call on a GPU, by its events: the mean of enough calls."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats: dict[str, int] = {}

    def __call__(self, name: str, call: Callable[[], object]) -> float:
        if name not in self.repeats:
            call()  # compilation and autotuning at the first call are not timed
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once = self.milliseconds(call, 1)
            self.peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            self.repeats[name] = max(1, round(MIN_MS / max(once, 1e-3)))
        return self.milliseconds(call, self.repeats[name])

    def milliseconds(self, call: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
