"""Work in threads, results in order, and how far it is."""

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

from irpe_ds.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # pieces per thread that may wait for their turn
_PIECE = 8  # items that a thread takes at once, since handing over costs more than a header does


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[Result, None, None]:
    """Yield function(item) of each item, in order, with few of them in memory at a time.

    Threads, since decoders, encoders and files run without the interpreter's lock. An exception
    of the function, or closing the generator, cancels what has not begun.

    Raises:
        ConfigError: there is less than one worker.
    """
    if workers < 1:
        raise ConfigError("--workers", "at least 1", workers)

    def apply(piece: list[Item]) -> list[Result]:
        return [function(item) for item in piece]

    iterator = iter(items)
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while piece := list(islice(iterator, _PIECE)):
                pending.append(pool.submit(apply, piece))
                if len(pending) == _AHEAD * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def local_share(cores: int) -> int:
    """These cores divided by the ranks of this run on this machine; at least one."""
    # torchrun sets the first, DeepSpeed's launcher the second.
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, cores // int(ranks))


def progress(what: str | None, total: int, done: int = 0, unit: str = "img") -> tqdm:
    """Speed and time left on stderr, unless `what` is None.

    A redirected log gets a line every half a minute.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        disable=what is None,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=0.1 if terminal else 30,
        delay=0 if terminal else 30,
        leave=terminal,
    )
