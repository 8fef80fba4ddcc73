"""What is noted of GPUs, and of the rank that is slowest."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from irpe_ds.benchmark import gpu_monitor
from irpe_ds.benchmark.cell import rank_columns
from irpe_ds.benchmark.gpu_monitor import GpuMonitor

GPU = torch.device("cuda:0")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Readings of a GPU, the last again and again."""
    readings = [(1000, 300_000, 60), (1400, 500_000, 70)]
    module: Any = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "pynvml", module)

    def read(column: int) -> Any:
        def function(device: torch.device) -> int:
            found = readings[0][column]
            if column == 2 and len(readings) > 1:
                readings.pop(0)
            return found

        return function

    for column, name in enumerate(("clock_rate", "power_draw", "temperature")):
        monkeypatch.setattr(torch.cuda, name, read(column))
    return readings


def test_means_of_what_nvml_says(
    nvml: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_monitor, "SECONDS", 0.001)
    with GpuMonitor(GPU) as monitor:
        while len(monitor._readings) < 2:
            pass
    del monitor._readings[2:]
    assert monitor.means() == {"mhz": 1200, "watt": 400, "celsius": 65}


@pytest.mark.parametrize("why", ["no GPU", "no nvidia-ml-py", "no driver", "not told"])
def test_without_readings_there_are_no_columns(
    why: str, nvml: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> int:
        raise RuntimeError if why == "no driver" else sys.modules["pynvml"].NVMLError

    if why == "no nvidia-ml-py":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if why in ("no driver", "not told"):
        monkeypatch.setattr(torch.cuda, "power_draw", fail)
    with GpuMonitor(torch.device("cpu") if why == "no GPU" else GPU) as monitor:
        monitor._thread.join(60)
    assert monitor.means() == {}


def test_the_slowest_rank_is_the_one_that_waits_for_no_other() -> None:
    fast = {"forward": 3.0, "backward": 5.0, "communication": 4.0}
    slow = {"forward": 4.0, "backward": 7.0, "communication": 1.0}
    gpus = [{"mhz": 1900.0}, {"mhz": 1200.0}, {"mhz": 1900.0}]
    found = rank_columns([*zip((fast, slow, fast), gpus, strict=True)], ["a", "a", "b"])
    assert found == {
        "rank_ms": [8.0, 11.0, 8.0],
        "slowest_rank": 1,
        "slowest_host": "a",
        "rank_mhz": [1900.0, 1200.0, 1900.0],
    }
    without = rank_columns([(fast, gpus[0]), (slow, {})], ["a", "b"])
    assert without.keys() == {"rank_ms", "slowest_rank", "slowest_host"}
