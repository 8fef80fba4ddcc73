"""Clock, power and temperature of a GPU while it works: a slow rank may have a hot one."""

from statistics import fmean
from threading import Event, Thread

import torch

SECONDS = 0.5
"""Between two readings."""


class GpuMonitor:
    """While entered, a thread reads what NVML says of a GPU.

    Without a GPU, nvidia-ml-py or NVML there are no readings, and `means` is empty.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._ended = device, Event()
        self._readings: list[tuple[float, float, float]] = []

    def __enter__(self) -> "GpuMonitor":
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def means(self) -> dict[str, float]:
        """Means by column: clock of the multiprocessors in MHz, power in W, temperature in C."""
        columns = zip(*self._readings, strict=True)
        return dict(zip(("mhz", "watt", "celsius"), map(fmean, columns), strict=False))

    def _read(self) -> None:
        if self._device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            while True:
                self._readings.append(
                    (
                        torch.cuda.clock_rate(self._device),
                        torch.cuda.power_draw(self._device) / 1000,
                        torch.cuda.temperature(self._device),
                    )
                )
                if self._ended.wait(SECONDS):
                    return
        except (pynvml.NVMLError, RuntimeError):  # no driver, or a GPU that does not tell
            return
