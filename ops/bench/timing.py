"""Timing side by side: every case once a round, so that a noisy minute meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

WARMUP = 2


class Timing(NamedTuple):
    """One case of a comparison."""

    median: float
    """Milliseconds."""
    ratio: float
    """To the baseline: the median over the rounds of the ratio within a round."""


def compare(
    cases: Mapping[str, Callable[[], object]], baselines: tuple[str, ...], rounds: int
) -> dict[str, Timing]:
    """Time cases against the baseline with the smaller median, after two rounds that do not count.

    Args:
        cases: what to call, by name; on CUDA the time includes all kernels it starts.
        baselines: names among the cases.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(WARMUP + rounds):
        for name, call in cases.items():
            elapsed = _milliseconds(call)
            if done >= WARMUP:
                times[name].append(elapsed)
    base = times[min(baselines, key=lambda name: statistics.median(times[name]))]
    return {
        name: Timing(
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, base, strict=True)),
        )
        for name, own in times.items()
    }


def _milliseconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
