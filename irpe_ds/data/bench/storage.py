"""What irpe_ds.data.bench reads from a storage with a cold page cache: loaders, and its limit."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from irpe_ds.data.bench.loaders import Epoch, LoaderSpec, ffcv_loader, ours

# Nothing imported above starts threads: the candidates do.

_CHUNK = 16 << 20  # bytes of a request
_REQUESTS = 4  # under way at once


def cold(prepare: Callable[[LoaderSpec], Epoch]) -> Callable[[LoaderSpec], Epoch]:
    """The same candidate with nothing of the file in the page cache when an epoch begins."""
    return partial(_cold, prepare)


def _cold(prepare: Callable[[LoaderSpec], Epoch], spec: LoaderSpec) -> Epoch:
    epoch = prepare(spec)

    def dropped() -> int:
        drop(spec.beton)
        return epoch()

    return dropped


def drop(path: Path) -> None:
    """Drop a file from the page cache; what a process has mapped stays."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(spec: LoaderSpec) -> Epoch:
    """Read the file from its beginning to its end: what the storage gives."""
    from irpe_ds.data.beton.reader import beton_info

    images = beton_info(spec.beton, "--beton").num_samples

    def epoch() -> int:
        with spec.beton.open("rb", buffering=0) as file, ThreadPoolExecutor(_REQUESTS) as pool:
            size = os.fstat(file.fileno()).st_size
            read = partial(os.pread, file.fileno(), _CHUNK)
            # One by one, so that few results are in memory.
            for _ in pool.map(lambda at: len(read(at)), range(0, size, _CHUNK)):
                pass
        return images

    return epoch


def blocks(spec: LoaderSpec) -> Epoch:
    """Our TrainLoader with order `blocks`, which drops what it has read."""
    return ours(replace(spec, order="blocks", os_cache=False))


def not_ahead(spec: LoaderSpec) -> Epoch:
    """Our TrainLoader as it was before it read ahead: a batch is read, and then decoded."""
    from irpe_ds.data.pipelines import ffcv

    def read_then_decode(beton: Any, samples: Any, blocks: Any, **options: Any) -> Any:
        import numpy as np

        with ThreadPoolExecutor(spec.workers) as pool:
            for first in range(0, len(samples), options["batch_size"]):
                own = samples[first : first + options["batch_size"]]
                entries, stored = beton.entries[own], list(pool.map(beton.payload, own))
                entries["start"] = np.cumsum(entries["bytes"]) - entries["bytes"]
                yield np.concatenate(stored), entries

    ffcv.read_ahead = read_then_decode  # in this candidate's own process
    return ours(spec)


def ffcv_quasi_random(spec: LoaderSpec) -> Epoch:
    """FFCV's own Loader as it is meant for data larger than the memory."""
    return ffcv_loader(spec, "QUASI_RANDOM", os_cache=False)


STORAGE: dict[str, Callable[[LoaderSpec], Epoch]] = {
    "sequential": cold(sequential),
    "blocks": cold(blocks),
    "global": cold(ours),
    "not-ahead": cold(not_ahead),
    "ffcv": cold(ffcv_quasi_random),
}
