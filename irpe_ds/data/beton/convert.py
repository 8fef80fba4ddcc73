"""A source of images -> .beton, its manifest and the hashes of its samples."""

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.beton.format import ALLOC_TABLE_TYPE, ENTRY_TYPE, VERSION
from irpe_ds.data.beton.images import StorageOptions, StoredImage, store_image
from irpe_ds.data.beton.journal import Journal, Stored
from irpe_ds.data.beton.manifest import (
    HASHES,
    MANIFEST,
    SKIPPED,
    Manifest,
    beside,
    file_sha256,
    hash_line,
)
from irpe_ds.data.beton.reader import tables_sha256
from irpe_ds.data.beton.sources import Files, Member, Source
from irpe_ds.data.beton.writer import BetonWriter, file_size, first_payload
from irpe_ds.data.parallel import map_in_order, progress
from irpe_ds.errors import DataError
from irpe_ds.files import fsync

OnBad = Literal["error", "skip"]

_COMMIT_SECONDS = 2.0  # a kill loses at most so much work
_PIECE = 1 << 12  # rows of the tables in memory at a time
_TRIALS = 100  # images that a dry run converts at most


def convert(
    source: Source,
    out: Path,
    options: StorageOptions,
    *,
    workers: int,
    on_bad: OnBad = "error",
    overwrite: bool = False,
    command: str = "",
) -> Manifest:
    """Convert a source; `out`, its manifest and hashes appear whole at the end, or not at all.

    The file depends on the images and the options alone: not on the kind of the source, on the
    number of workers, or on how often the conversion was killed and called again. Images are
    ordered by class and then by name.

    Args:
        workers: reading and encoding threads.
        on_bad: what to do with an image that cannot be stored: stop, or leave it out and list it.
        overwrite: replace `out`, and what an unfinished conversion with other options left.
        command: what to record as the command that converted.

    Raises:
        DataError: the source has no images or a damaged one, `out` exists or cannot be written.
    """
    journal_path, unfinished = beside(out, ".partial.db"), beside(out, ".partial")
    settings = {"source": [os.fspath(path) for path in source.paths], "kind": source.kind}
    settings |= asdict(options) | {"ffcv": VERSION}
    exists = DataError("--out", "a new file, or --overwrite", f"{out}, which exists")
    if out.exists() and not overwrite and not journal_path.exists():
        raise exists
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with closing(Journal(journal_path, settings, anew=overwrite)) as journal:
            renamed = journal.finished and out.exists() and not unfinished.exists()
            if out.exists() and not overwrite and not renamed:
                raise exists
            if not renamed:
                manifest = _convert(source, out, options, journal, workers, on_bad, command)
                manifest.write(beside(out, MANIFEST + ".partial"))
                for suffix in (HASHES, SKIPPED):
                    fsync(beside(out, suffix + ".partial"))
                journal.finish()
            _publish(out)
        journal_path.unlink()
        return Manifest.read(beside(out, MANIFEST))
    except (OSError, sqlite3.Error) as error:
        got = f"{out}: {error}; what is done is kept, the same command goes on"
        raise DataError("--out", "a file that can be written", got) from None


def _convert(
    source: Source,
    out: Path,
    options: StorageOptions,
    journal: Journal,
    workers: int,
    on_bad: OnBad,
    command: str,
) -> Manifest:
    """Write everything under its unfinished name, but the manifest."""
    classes, others = journal.enter(source)
    room, _ = journal.totals()
    if on_bad == "error":
        first_bad = next(journal.skipped(), None)  # it was called with skip before
        if first_bad is not None:
            journal.forget(first_bad[-1].position)
    _, begin, end, largest = journal.written()
    unfinished = beside(out, ".partial")
    in_place = unfinished.exists() and unfinished.stat().st_size >= end
    if not in_place or begin != first_payload(room):
        journal.forget()
        end, largest = 0, 0
    with (
        closing(BetonWriter(unfinished, room=room, end=end, largest=largest)) as writer,
        _Commits(journal, writer) as commits,
    ):
        _store(journal, writer, commits, Files(source), options, workers, on_bad)
        counts = journal.counts()
        if not counts["num_samples"]:
            raise DataError("--source", "an image that can be stored", "none")
        _write_lists(journal, out)
        writer.finish(_tables(journal))
        sha256 = file_sha256(unfinished, "hash")
    return Manifest(
        source=[os.fspath(path) for path in source.paths],
        kind=source.kind,
        options=asdict(options),
        left_out=others,
        classes=classes,
        class_counts=journal.class_counts(len(classes)),
        size=unfinished.stat().st_size,
        sha256=sha256,
        tables_sha256=tables_sha256(unfinished, counts["num_samples"]),
        hashes_sha256=file_sha256(beside(out, HASHES + ".partial")),
        ffcv=VERSION,
        command=command,
        **counts,
    )


def _store(
    journal: Journal,
    writer: BetonWriter,
    commits: "_Commits",
    files: Files,
    options: StorageOptions,
    workers: int,
    on_bad: OnBad,
) -> None:
    """Read, check and write what is not done yet."""
    first, total = journal.written()[0], journal.totals()[0]
    work = map_in_order(partial(_read, files, options), journal.images(first), workers=workers)
    with closing(files), closing(work), progress("convert", total, first) as bar:
        for position, (member, found) in enumerate(work, first):
            if isinstance(found, str):
                if on_bad == "error":
                    raise DataError(member, "an undamaged image, or --on-bad skip", found)
                journal.add(Stored.left_out(position, found))
            else:
                image, sha256 = found
                start = writer.append(image.payload)
                size = image.height, image.width
                place = start, len(image.payload), image.mode, *size, image.original
                journal.add(Stored(position, *place, sha256, None))
            bar.update()
            commits.advance()
    commits.begin()


class _Commits:
    """Commits of what is done, each once a thread has brought it to the disk.

    Meanwhile the conversion goes on. Leaving the context commits the rest, unless the disk failed:
    after a failed fsync another one succeeds, whatever was lost.
    """

    def __init__(self, journal: Journal, writer: BetonWriter) -> None:
        self._journal, self._writer = journal, writer
        self._thread = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None
        self._last = time.monotonic()

    def advance(self) -> None:
        """Begin a commit when the last one is long ago, and end it when it can be."""
        if self._sync is None:
            if time.monotonic() - self._last > _COMMIT_SECONDS:
                self.begin()
        elif self._sync.done():
            self._end()

    def begin(self) -> None:
        """Commit what was entered so far, when it is on the disk."""
        if self._sync is not None:
            self._end()
        self._journal.stage()
        self._sync = self._thread.submit(self._writer.sync)

    def _end(self) -> None:
        if self._sync is not None:
            self._sync.result()
            self._journal.commit()
            self._sync, self._last = None, time.monotonic()

    def __enter__(self) -> "_Commits":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._thread:
            if kind is None or not issubclass(kind, (OSError, sqlite3.Error)):
                self.begin()
                self._end()


Found = tuple[StoredImage, bytes] | str


def _read(
    files: Files, options: StorageOptions, item: tuple[int, Member, bool]
) -> tuple[Member, Found]:
    """The image and its hash, or why there is none."""
    position, member, repeated = item
    if repeated:
        return member, "its name is that of another image of its class"
    try:
        image = store_image(files.read(member), position, options)
    except ValueError as error:
        return member, str(error)
    return member, (image, image.sha256)


def _tables(journal: Journal) -> Iterator[tuple[NDArray[np.void], NDArray[np.void]]]:
    """Metadata entries and allocations of all samples, piece by piece."""
    rows, sample = journal.kept(), 0
    while piece := list(islice(rows, _PIECE)):
        entries, table = np.zeros(len(piece), ENTRY_TYPE), np.zeros(len(piece), ALLOC_TABLE_TYPE)
        stored = [stored for *_, stored in piece]
        for name in ("mode", "height", "width"):
            entries["f0"][name] = [getattr(image, name) for image in stored]
        entries["f0"]["data_ptr"] = table["ptr"] = [image.start for image in stored]
        entries["f1"] = [label for label, *_ in piece]
        table["sample_id"] = np.arange(sample, sample + len(piece))
        table["size"] = [image.size for image in stored]
        sample += len(piece)
        yield entries, table


def _write_lists(journal: Journal, out: Path) -> None:
    """The hashes of the samples, and what was left out and why."""
    with beside(out, HASHES + ".partial").open("wb") as file:
        for _, category, name, stored in journal.kept():
            file.write(hash_line(stored.sha256, f"{category}/{name}"))
    with beside(out, SKIPPED + ".partial").open("wb") as file:
        for _, category, name, stored in journal.skipped():
            file.write(os.fsencode(f"{category}/{name}\t{stored.reason}\n"))


def _publish(out: Path) -> None:
    """Give everything its name, the manifest last; goes on where it was killed."""
    if beside(out, MANIFEST + ".partial").exists():
        beside(out, MANIFEST).unlink(missing_ok=True)  # it describes the file that goes
    for suffix in ("", HASHES, SKIPPED, MANIFEST):
        unfinished = beside(out, suffix + ".partial")
        if unfinished.exists():
            os.replace(unfinished, beside(out, suffix))
    skipped = beside(out, SKIPPED)
    if skipped.exists() and not skipped.stat().st_size:
        skipped.unlink()
    fsync(out.parent)


@dataclass(frozen=True)
class Forecast:
    """What a conversion would do."""

    images: int
    """Images listed."""
    classes: int
    """Their classes."""
    left_out: int
    """Files that are no images by their name."""
    size: int
    """Bytes of the .beton to expect."""
    free: int
    """Bytes free where it would be written."""
    seconds: float
    """Time to expect, from the speed of the trial."""
    bad: dict[str, str]
    """Bad images among those tried, and what is wrong with each."""


def forecast(source: Source, out: Path, options: StorageOptions, *, workers: int) -> Forecast:
    """List a source and try some of its images, spread evenly; nothing is written.

    Raises:
        DataError: the source has no images.
    """
    with closing(Journal(None, {})) as journal, closing(Files(source)) as files:
        classes, others = journal.enter(source)
        count, listed = journal.totals()
        trials = list(journal.images(0, step=-(-count // _TRIALS)))
        read = stored = 0
        bad = {}
        since = time.monotonic()
        for item in trials:
            member, found = _read(files, options, item)
            if isinstance(found, str):
                bad[f"{member.category}/{member.name}"] = found
            else:
                read += member.size
                stored += len(found[0].payload)
        each = (time.monotonic() - since) / len(trials)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    return Forecast(
        images=count,
        classes=len(classes),
        left_out=others,
        size=file_size(count, round(listed * (stored / read if read else 1))),
        free=shutil.disk_usage(parent).free,
        seconds=count * each / workers,
        bad=bad,
    )
