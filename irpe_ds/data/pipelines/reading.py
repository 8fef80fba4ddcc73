"""Reads the stored images of coming batches while earlier ones are decoded."""

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from irpe_ds.cli import command
from irpe_ds.data.beton.reader import Beton
from irpe_ds.data.order import Samples
from irpe_ds.errors import DataError

REQUESTS = 16
"""Requests under way at once: with 110 KB each and 2 ms of latency, 880 MB/s."""
AHEAD = 8
"""Batches that are read before they are decoded."""
_IMAGES = 8  # of a request at least: handing one over takes as long as reading a cached image
_GAP = 1 << 16  # bytes: skipping fewer takes as long as reading them

Stored = tuple[NDArray[np.uint8], NDArray[np.void]]
"""The stored images of a batch, one after the other, and ENTRY of each sample in them."""


def read_ahead(
    beton: Beton, samples: Samples, blocks: NDArray[np.int64], *, batch_size: int, os_cache: bool
) -> Generator[Stored, None, None]:
    """Yield the stored images of each batch, in order; each is checked at its first use.

    In memory is what has been read and not been yielded: up to AHEAD batches, and what later
    batches need of the blocks in them.

    Args:
        samples: those of the first batch, then those of the second, ...; the last may be smaller.
        blocks: samples of the same block are read when the first of them is needed, neighbours
            in the file in one request.
        os_cache: whether what has been read stays in the page cache.

    Raises:
        DataError: an image cannot be read, or differs from what was converted.
    """
    if not len(samples):
        return
    beton.disable_readahead()  # it reads into blocks that are not needed, 13 % more of a file
    plan = _plan(beton, samples, blocks)
    batches: dict[int, _Batch] = {}
    submitted = 0
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="read")
    try:
        for number, begin in enumerate(range(0, len(samples), batch_size)):
            due = int(np.searchsorted(plan.needed, begin + (1 + AHEAD) * batch_size))
            for request in range(submitted, due):
                positions = plan.positions[plan.bounds[request] : plan.bounds[request + 1]]
                for touched in np.unique(positions // batch_size).tolist():
                    if touched not in batches:
                        own = samples[touched * batch_size : (touched + 1) * batch_size]
                        batches[touched] = _Batch(beton, own)
                places = [divmod(position, batch_size) for position in positions.tolist()]
                parts = [batches[touched].part(place) for touched, place in places]
                future = pool.submit(_read, beton, samples[positions], parts, os_cache)
                for touched, _ in places:
                    batches[touched].reads.add(future)
            submitted = due
            batch = batches.pop(number)
            for read in batch.reads:
                read.result()
            yield batch.payloads, batch.entries
    finally:
        pool.shutdown(cancel_futures=True)


class _Batch:
    """Memory for the stored images of a batch, and the requests that fill it."""

    def __init__(self, beton: Beton, samples: Samples) -> None:
        self.entries = beton.entries[samples]
        self._ends = np.cumsum(self.entries["bytes"])
        self.entries["start"] = self._ends - self.entries["bytes"]
        self.payloads = np.empty(self._ends[-1], np.uint8)
        self.reads: set[Future[None]] = set()

    def part(self, place: int) -> NDArray[np.uint8]:
        """Where an image of the batch belongs."""
        return self.payloads[self.entries["start"][place] : self._ends[place]]


class _Plan(NamedTuple):
    """What is read by one request, in the order in which requests are needed."""

    positions: NDArray[np.int64]
    """Of samples: those of each request, in file order."""
    bounds: NDArray[np.int64]
    """Where those of each request begin, and the end of the last."""
    needed: NDArray[np.int64]
    """The first position that needs each request."""


def _plan(beton: Beton, samples: Samples, blocks: NDArray[np.int64]) -> _Plan:
    """Each block is a request; small ones, in order, are joined."""
    by_block = blocks.argsort(kind="stable")
    starts = np.flatnonzero(np.diff(blocks[by_block], prepend=-1))
    sizes = np.diff(starts, append=len(blocks))
    in_order = by_block[starts].argsort()
    request = np.empty(len(starts), np.int64)
    request[in_order] = (sizes[in_order].cumsum() - 1) // _IMAGES
    request = np.repeat(request, sizes)
    file, start, _ = beton.extents(samples[by_block])
    in_file = np.lexsort((start, file, request))
    positions, request = by_block[in_file], request[in_file]
    bounds = np.flatnonzero(np.diff(request, prepend=-1))
    needed = np.minimum.reduceat(positions, bounds)
    return _Plan(positions, np.append(bounds, len(positions)), needed)


def _read(
    beton: Beton, samples: Samples, parts: Sequence[NDArray[np.uint8]], os_cache: bool
) -> None:
    """Read samples, given in file order, each to its part of a batch."""
    file, start, size = beton.extents(samples)
    again = (np.diff(file, prepend=-1) == 0) & (np.diff(start, prepend=-1) == 0)
    once = np.flatnonzero(~again)
    file, start, size = file[once], start[once], size[once]
    gaps = start[1:] - (start + size)[:-1]
    cuts = np.flatnonzero((np.diff(file) != 0) | (gaps < 0) | (gaps > _GAP)) + 1
    for run in np.split(once, cuts):
        beton.read_run(samples[run], [parts[place] for place in run.tolist()])
        if not os_cache:
            beton.forget(samples[run])
    for place in once.tolist():
        check(beton, int(samples[place]), parts[place])
    for place in np.flatnonzero(again).tolist():
        parts[place][:] = parts[place - 1]


def check(beton: Beton, sample: int, payload: NDArray[np.uint8]) -> None:
    """Compare a sample with its hash, if it has not been compared yet in this process."""
    if not beton.checked[sample] and not beton.is_intact(sample, payload):
        raise damage(beton, sample)
    beton.checked[sample] = True


def damage(beton: Beton, sample: int) -> DataError:
    """The error of a sample that is not what was converted."""
    expected = f"undamaged images ({command('data_prep/verify.py')} checks them all)"
    return DataError(beton.info.path, expected, f"damage in sample {sample}")
