"""Signals that stop a run: it finishes the update, saves, and exits with `ExitCode.REQUEUE`."""

import errno
import os
import signal
import time
from threading import Event, Thread
from typing import Any, TextIO, cast

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""SLURM warns with SIGUSR1; a terminal that closes sends SIGHUP."""
DUPLICATE_SECONDS = 2.0
"""Signals this close together are one request, passed on by both terminal and launcher."""


class BrokenPipeSafe:
    """A text stream that drops output once its reader is gone, as ssh is when a launcher exits."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def broken_pipe_safe(stream: TextIO) -> TextIO:
    """The stream, without errors once its reader is gone."""
    return cast(TextIO, BrokenPipeSafe(stream))


class StopSignals:
    """While entered, SIGNALS are only recorded; SIGHUP is left ignored under nohup.

    Ctrl-C some seconds after another signal ends the process at once; a scheduler that repeats its
    own signal does not interrupt saving. A thread reads what the kernel delivers, because Python
    runs signal handlers in the main thread, which may be waiting in a collective.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self.arrived = Event()
        """Set once there is one, and on exit."""
        self.finished = False
        """Set once everything is saved: further signals have no effect."""

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in SIGNALS if number != signal.SIGHUP or not nohup]
        self._handlers_before = {number: signal.signal(number, _ignore) for number in numbers}
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self.arrived.set()
        os.close(self._writer)  # ends the thread, which closes the other end

    def _listen(self) -> None:
        first = 0.0
        while data := os.read(self._reader, 1):
            number = data[0]
            if number not in SIGNALS:
                continue
            if self.received is None:
                self.received, first = signal.Signals(number).name, time.monotonic()
                self.arrived.set()
                continue
            is_new = time.monotonic() - first > DUPLICATE_SECONDS
            if number == signal.SIGINT and is_new and not self.finished:
                os._exit(128 + number)  # as a shell reports a process killed by it
        os.close(self._reader)


def _ignore(number: int, frame: object) -> None:
    """The handler that Python runs; the thread has read the signal already."""
