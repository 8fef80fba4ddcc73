"""Signals that ask a run to stop: it finishes its update, saves and ends with a code of its own."""

import os
import signal
import time
from threading import Thread

REQUEUE = 75
"""Exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TOGETHER_SECONDS = 2.0  # a terminal and a launcher may both pass one wish on


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C only leave a note.

    Ctrl-C, seconds after another signal, ends the process at once; a scheduler that repeats its own
    does not cut the saving short. A thread reads what the kernel delivers, because Python's own
    handlers wait as long as the main thread waits for other ranks.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """The name of the first signal."""
        self.finished = False
        """Set when everything is saved: further signals change nothing."""

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread, which closes the other end

    def _listen(self) -> None:
        first = 0.0
        while data := os.read(self._reader, 1):
            number = data[0]
            if number not in SIGNALS:
                continue
            if self.received is None:
                self.received, first = signal.Signals(number).name, time.monotonic()
                continue
            late = time.monotonic() - first > _TOGETHER_SECONDS
            if number == signal.SIGINT and late and not self.finished:
                os._exit(128 + number)
        os.close(self._reader)


def _ignore(number: int, frame: object) -> None:
    """What Python runs; the thread has read the signal already."""
