"""Images are read ahead of their decoding, few at a time, in large requests."""

import errno
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irpe_ds.data.beton.reader import Beton, read_beton
from irpe_ds.data.pipelines import reading
from irpe_ds.data.pipelines.reading import AHEAD, read_ahead
from irpe_ds.errors import DataError

Requests = list[tuple[int, int]]
PREADV = os.preadv


@pytest.fixture
def opened(beton: Path) -> Beton:
    return read_beton(beton, "test")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """First byte and bytes of each read."""
    found: Requests = []

    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        found.append((offset, sum(map(len, views))))
        return PREADV(file, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def read(beton: Beton, samples: Any, blocks: Any, **options: Any) -> list[bytes]:
    """The stored bytes of each sample, as they arrive."""
    options = {"batch_size": 4, "os_cache": True} | options
    found = []
    for stored, entries in read_ahead(beton, np.array(samples), np.array(blocks), **options):
        found += [stored[e["start"] : e["start"] + e["bytes"]].tobytes() for e in entries]
    return found


def stored(beton: Beton, samples: Any) -> list[bytes]:
    data = beton.info.path.read_bytes()
    entries = beton.entries[samples]
    return [data[e["start"] : e["start"] + e["bytes"]] for e in entries]


def test_neighbours_of_a_block_are_one_request(opened: Beton, requests: Requests) -> None:
    samples = np.random.default_rng(0).permutation(37)
    assert read(opened, samples, samples // 16) == stored(opened, samples)
    entries = opened.entries[[0, 16, 32]]
    sizes = [int(opened.entries["bytes"][first : first + 16].sum()) for first in (0, 16, 32)]
    assert sorted(requests) == list(zip(entries["start"].tolist(), sizes, strict=True))


def test_images_far_apart_are_requests_of_their_own(
    opened: Beton, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_GAP", 0)
    samples = [5, 1, 2, 36, 1, 3, 1]  # some more than once, in one batch or in two
    assert read(opened, samples, [0] * 7) == stored(opened, samples)
    sizes = opened.entries["bytes"].tolist()
    assert sorted(size for _, size in requests) == sorted([sum(sizes[1:4]), sizes[5], sizes[36]])


@pytest.mark.parametrize("most", [1, 700, 5000])
def test_the_system_may_read_less_than_asked(
    opened: Beton, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        return PREADV(file, [views[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    samples = [3, 1, 6]
    assert read(opened, samples, [0] * 3) == stored(opened, samples)


def test_an_error_names_the_image_that_it_is_in(
    opened: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = int(opened.entries["start"][20])

    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        if offset >= bad:
            raise OSError(errno.EIO, "Input/output error")
        return PREADV(file, [views[0][: bad - offset]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(DataError, match=r"to read sample 20 of .*, got Input/output error"):
        read(opened, range(16, 24), [0] * 8)


def test_reading_stays_a_few_batches_ahead(opened: Beton, requests: Requests) -> None:
    samples = np.arange(32)
    with closing(read_ahead(opened, samples, samples, batch_size=1, os_cache=True)) as batches:
        for number, _ in zip(range(24), batches, strict=False):
            due = 1 + (number + AHEAD) // 8  # requests of eight images
            while len(requests) < due:
                time.sleep(0.001)
            assert len(requests) == due


def test_nothing_to_read(opened: Beton) -> None:
    assert read(opened, np.empty(0, np.int64), np.empty(0, np.int64)) == []


@pytest.mark.parametrize("os_cache", [True, False])
def test_what_has_been_read_leaves_the_page_cache(
    opened: Beton, monkeypatch: pytest.MonkeyPatch, os_cache: bool
) -> None:
    dropped = []

    def fadvise(file: int, offset: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, offset + size))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    samples = np.arange(37)
    read(opened, samples, samples // 16, os_cache=os_cache)
    if os_cache:
        assert not dropped
        return
    page = os.sysconf("SC_PAGESIZE")
    for entry in opened.entries:
        assert any(a <= entry["start"] < entry["start"] + entry["bytes"] <= b for a, b in dropped)
    assert all(offset % page == size % page == 0 for offset, size in dropped)
