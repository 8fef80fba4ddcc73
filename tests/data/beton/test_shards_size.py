"""Sharded data sets of many images: how long they take to open, and what memory to convert."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from irpe_ds.data.beton.format import ALLOC_TABLE_TYPE, ENTRY_TYPE, JPG
from irpe_ds.data.beton.manifest import (
    HASHES,
    MANIFEST,
    DatasetManifest,
    FileRecord,
    beside,
    file_sha256,
    hash_line,
    shard_path,
)
from irpe_ds.data.beton.options import SourceOptions, StorageOptions
from irpe_ds.data.beton.reader import read_beton, tables_sha256
from irpe_ds.data.beton.shards import convert_shards
from irpe_ds.data.beton.sources import Source, is_image, open_source
from irpe_ds.data.beton.sources.source import SourceFile
from irpe_ds.data.beton.writer import BetonWriter, first_payload
from tests.forks import start

pytestmark = pytest.mark.slow


def test_a_million_images_open_in_a_second(tmp_path: Path) -> None:
    """Of processor time: what else runs on the machine does not count."""
    out, records, each = tmp_path / "large.beton", list[FileRecord](), 62_500
    for number in range(16):
        path, start = shard_path(out, number, 16), first_payload(each)
        table, entries = np.zeros(each, ALLOC_TABLE_TYPE), np.zeros(each, ENTRY_TYPE)
        table["sample_id"], table["size"] = np.arange(each), 100
        table["ptr"] = start + 100 * np.arange(each)
        for name, value in (("data_ptr", table["ptr"]), ("height", 9), ("width", 9), ("mode", JPG)):
            entries["f0"][name] = value
        with closing(BetonWriter(path, room=each, end=start + 100 * each, largest=100)) as writer:
            writer.finish([(entries, table)])
        names = (f"n00000000/n00000000_{number}_{n}.JPEG" for n in range(each))
        lines = [hash_line(hashlib.sha256(name.encode()).digest(), name) for name in names]
        beside(path, HASHES).write_bytes(b"".join(lines))
        record = FileRecord(
            num_samples=each,
            size=path.stat().st_size,
            sha256="0" * 64,
            tables_sha256=tables_sha256(path, each),
            hashes_sha256=file_sha256(beside(path, HASHES)),
        )
        records.append(record)
    sums = {"num_samples": 16 * each, "size": 16 * record.size}
    none = dict.fromkeys(("changed", "skipped", "duplicates", "left_out"), 0)
    DatasetManifest(
        **vars(record) | sums | none | {"source": [], "kind": "", "options": {}},
        ffcv="",
        command="",
        classes=("n00000000",),
        class_counts=(16 * each,),
        shards=tuple(records),
    ).write(beside(out, MANIFEST))
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        beton = read_beton(out, "data.train")
        seconds.append(time.process_time() - begin)
    assert beton.hashes is not None
    assert len(beton.hashes) == len(beton.entries) == 1_000_000
    assert int(beton.hashes[-1]) == int(lines[-1][:16], 16)
    assert min(seconds) < 1


class Repeated(Source):
    """One image again and again, under other names."""

    kind = "one image"

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__([folder], SourceOptions())
        self.count = count
        self.image = next(file for file in open_source([folder]).files() if is_image(file.path))

    def files(self) -> Iterator[SourceFile]:
        for number in range(self.count):
            yield self.image._replace(path=f"{number % 2}/name/of/usual/length/{number:08d}.jpg")


def convert_repeated(folder: Path, out: Path, count: int, num_shards: int) -> None:
    """Convert in a process of its own, and write by how many KiB its memory grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    options, before = StorageOptions(check="header"), peak_kib()
    convert_shards(Repeated(folder, count), out, options, num_shards, workers=1)
    beside(out, ".peak").write_text(str(peak_kib() - before))


def peak_kib() -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return int(line.split()[1])


def test_memory_does_not_grow_with_the_data_set(folder: Path, tmp_path: Path) -> None:
    peaks = []
    for count, num_shards in ((10_000, 2), (100_000, 5)):
        out = tmp_path / f"{count}-{num_shards}.beton"
        process = start(convert_repeated, folder, out, count, num_shards)
        process.join()
        assert process.exitcode == 0
        peaks.append(int(beside(out, ".peak").read_text()))
    assert max(peaks) - peaks[0] < 8 << 10, peaks
