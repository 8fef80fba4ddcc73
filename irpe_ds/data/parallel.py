"""Work in threads with results in order, and its progress."""

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

_AHEAD = 4  # chunks per thread that may wait for their turn
_CHUNK = 8  # items that a thread takes at once: handing over costs more than reading a header


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[Result, None, None]:
    """Yield function(item) of each item, in order, with few of them in memory at a time.

    In threads: decoding, encoding and reading release the GIL. An exception in the function, or
    closing the generator, cancels the items not begun.

    Raises:
        ConfigError: `workers` is less than 1.
    """
    check_workers(workers)

    def apply(chunk: list[Item]) -> list[Result]:
        return [function(item) for item in chunk]

    iterator = iter(items)
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while chunk := list(islice(iterator, _CHUNK)):
                pending.append(pool.submit(apply, chunk))
                if len(pending) == _AHEAD * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def check_workers(workers: int) -> None:
    """Raise ConfigError if there are no workers."""
    if workers < 1:
        raise ConfigError("--workers", "at least 1", workers)


def local_share(cores: int) -> int:
    """The cores divided by the number of ranks on this machine, at least 1."""
    # torchrun sets the first, DeepSpeed's launcher (0.19) the second.
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, cores // int(ranks))


def progress(what: str | None, total: int, done: int = 0, unit: str = "img") -> tqdm:
    """A bar with speed and time left on stderr, titled `what`. None: no bar.

    A redirected log gets a line every 30 seconds.
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
