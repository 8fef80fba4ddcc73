"""Signals that ask a run to stop: it finishes its update, saves and ends with a code of its own."""

import errno
import os
import signal
import time
from threading import Thread
from typing import Any, TextIO, cast

from irpe_ds.cluster.process_group import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TOGETHER_SECONDS = 2.0  # a terminal and a launcher may both pass one wish on


ASK_SECONDS = 1.0
"""How long a signal to one rank may take to reach the others."""
ASK_CALLS = 100
"""Calls after which they are asked however little time has passed."""


class Lasting:
    """A stream whose reader may go, as ssh does when a launcher ends: what follows is dropped."""

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


def lasting(stream: TextIO) -> TextIO:
    """The stream, without an error when its reader has gone."""
    return cast(TextIO, Lasting(stream))


class StopVote:
    """Has a signal come to one of the ranks? Asked on all of them at the same call, now and then.

    To ask takes two messages for each rank, one after the other: at hundreds of ranks longer than
    an update. The answer has each rank's pace, so all know when to ask next. Every rank calls it
    as often as the others.
    """

    def __init__(self, ranks: Ranks, stop: "StopSignals") -> None:
        self._ranks, self._stop = ranks, stop
        self.restart()

    def restart(self) -> None:
        """Ask at the next call: what is done between calls is going to be something else."""
        self._calls, self._next, self._since = 0, 1, time.monotonic()

    def __call__(self) -> bool:
        """Whether to stop."""
        self._calls += 1
        if self._calls < self._next:
            return False
        now = time.monotonic()
        slowest = (now - self._since) / self._calls
        found, seconds = self._ranks.all_reduce_max([self._stop.received is not None, slowest])
        wait = int(ASK_SECONDS / max(seconds, 1e-9))
        self._calls, self._next, self._since = 0, min(max(wait, 1), ASK_CALLS), now
        return bool(found)


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
