"""Where a run's log goes besides its files: threads that never delay training; TensorBoard."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Protocol

from irpe_ds.errors import ExitCode

if TYPE_CHECKING:
    from numpy import ndarray

QUEUE_ROWS = 10_000  # that a background sink may lag behind; about 20 MB


class Sink(Protocol):
    """W&B or TensorBoard."""

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Numbers after an update."""

    def picture(self, name: str, update: int, pixels: "ndarray") -> None:
        """(H, W, 3) uint8."""

    def table(self, name: str, update: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows with the same columns."""

    def checkpoint(
        self, folder: Path, update: int, scores: Mapping[str, float], aliases: Sequence[str]
    ) -> None:
        """A checkpoint to keep."""

    def close(self, exit_code: ExitCode, reason: str) -> None:
        """The end of the run; why, if it is not the planned one."""


class BackgroundSink:
    """Runs a sink in a thread: whatever it does, raises or hangs in, only `wait` ever blocks.

    A daemon thread, so that the process can exit while the sink hangs.

    Args:
        warn: called when the sink fails and when rows are lost, from either thread.
    """

    def __init__(
        self, label: str, open_sink: Callable[[], Sink], warn: Callable[[str], None]
    ) -> None:
        self.label, self._warn = label, warn
        self._queue: SimpleQueue[Callable[[Sink], None] | None] = SimpleQueue()
        self._full = False
        self._thread = Thread(target=self._work, args=(open_sink,), name=label, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Sink], None]) -> None:
        """Queue a call for the thread; it is lost if QUEUE_ROWS are queued already."""
        if self._queue.qsize() < QUEUE_ROWS:
            self._queue.put(job)
        elif not self._full and self._thread.is_alive():
            self._full = True
            queued = f"{QUEUE_ROWS} rows are queued, further ones are lost"
            self._warn(f"{self.label} logging hangs: {queued}")

    def end(self, exit_code: ExitCode, reason: str) -> None:
        """Close the sink once it has received everything."""
        self._queue.put(lambda sink: sink.close(exit_code, reason))
        self._queue.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait for the sink to close; whether it has."""
        self._thread.join(max(seconds, 0))
        return not self._thread.is_alive()

    def _work(self, open_sink: Callable[[], Sink]) -> None:
        try:
            sink = open_sink()
            while (job := self._queue.get()) is not None:
                job(sink)
        except Exception as error:  # whatever a sink raises, training continues
            self._warn(switched_off(self.label, error))


def switched_off(label: str, error: Exception) -> str:
    return f"{label} logging switched off: {type(error).__name__}: {error}"


class TensorBoardSink:
    """Scalars `{kind}/{name}` over updates, and pictures; a resume hides what it will repeat."""

    def __init__(self, folder: Path, resume_update: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_update is None else resume_update + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{kind}/{key}", value, update)
        self._writer.flush()  # the writer is a thread: only this call raises its errors

    def picture(self, name: str, update: int, pixels: "ndarray") -> None:
        self._writer.add_image(name, pixels, update, dataformats="HWC")

    def table(self, name: str, update: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Nothing: TensorBoard has no tables."""

    def checkpoint(
        self, folder: Path, update: int, scores: Mapping[str, float], aliases: Sequence[str]
    ) -> None:
        """Nothing: TensorBoard keeps no files."""

    def close(self, exit_code: ExitCode, reason: str) -> None:
        self._writer.close()
