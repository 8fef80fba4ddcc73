"""Where the time of an update goes, by operator and kernel: traces of torch.profiler."""

from pathlib import Path
from typing import Any

from torch import profiler

from irpe_ds.cluster.process_group import Ranks

FOLDER = "traces"
"""Of the run folder; rank-N.json.gz of each rank opens in Perfetto and in chrome://tracing."""
SKIPPED = 3
"""Updates before the first that is traced, in which memory is allocated and kernels are chosen."""


class Trace:
    """While entered, traces updates after the first SKIPPED; without a number, does nothing.

    Args:
        updates: how many, None for none. If a run ends sooner, the file has those until then.
        folder: the run folder.
    """

    def __init__(self, updates: int | None, folder: Path, ranks: Ranks) -> None:
        self._path = folder / FOLDER / f"rank-{ranks.rank}.json.gz"
        self._profiler: Any = None
        if updates is not None:
            # The profiler is slow at first: the last update that is skipped is its rehearsal.
            plan = profiler.schedule(wait=SKIPPED - 1, warmup=1, active=updates, repeat=1)
            self._profiler = profiler.profile(schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> "Trace":
        if self._profiler is not None:
            self._path.parent.mkdir(exist_ok=True)
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def step(self) -> None:
        """An update has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, recorded: Any) -> None:
        recorded.export_chrome_trace(str(self._path))
