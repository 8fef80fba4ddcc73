"""Work in threads, results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from irpe_ds.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # results per thread that may wait for their turn


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
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
