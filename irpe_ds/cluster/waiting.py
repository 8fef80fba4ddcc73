"""A line every half minute while a rank waits or works without another sign of life."""

import sys
import time
from collections.abc import Callable
from threading import Event, Thread

SECONDS = 30.0


class Waiting:
    """While entered, a thread says every SECONDS what is waited for, and since when.

    Args:
        what: a text, or a function that makes one; the thread calls it.
        active: False: nothing is said, as on all ranks but one.
    """

    def __init__(self, what: str | Callable[[], str], active: bool = True) -> None:
        self._active, self._done = active, Event()
        self.next(what)

    def __enter__(self) -> "Waiting":
        self._since = self._told = time.monotonic()
        if self._active:
            Thread(target=self._tell, name="waiting", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def next(self, what: str | Callable[[], str]) -> None:
        """Say from now on that something else is waited for."""
        self._what = what
        self._since = self._told = time.monotonic()

    def _tell(self) -> None:
        while not self._done.wait(max(0.0, self._told + SECONDS - time.monotonic())):
            now = time.monotonic()
            if now - self._told >= SECONDS:
                what = self._what if isinstance(self._what, str) else self._what()
                sys.stderr.write(f"{what}: {now - self._since:.0f} s so far\n")
                sys.stderr.flush()
                self._told = now
