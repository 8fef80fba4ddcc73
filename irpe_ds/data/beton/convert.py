"""Convert a source of images to .beton, with its manifest and the hashes of its samples."""

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.beton.format import ALLOC_TABLE_TYPE, ENTRY_TYPE, VERSION
from irpe_ds.data.beton.images import StoredImage, store_image
from irpe_ds.data.beton.journal import (
    JOURNAL,
    PARTIAL,
    DoneImage,
    Journal,
    already_exists,
    check_out,
    damaged_journal,
)
from irpe_ds.data.beton.left_out import list_line
from irpe_ds.data.beton.listing import Listing
from irpe_ds.data.beton.manifest import (
    HASHES,
    LEFT_OUT,
    MANIFEST,
    SKIPPED,
    DatasetManifest,
    beside,
    file_sha256,
    hash_line,
)
from irpe_ds.data.beton.options import MAX_BAD, OnBad, StorageOptions, check_share
from irpe_ds.data.beton.places import cannot_write, target
from irpe_ds.data.beton.reader import tables_sha256
from irpe_ds.data.beton.skipping import BadImages
from irpe_ds.data.beton.sources import Files, Member, Source
from irpe_ds.data.beton.writer import BetonWriter, first_payload
from irpe_ds.data.parallel import map_in_order, progress
from irpe_ds.errors import DataError, UserError
from irpe_ds.files import fsync, open_regular

_COMMIT_SECONDS = 2.0  # between commits: what a kill loses at most
_CHUNK = 1 << 12  # rows of the tables in memory at a time
_LISTS = (SKIPPED, LEFT_OUT)

Announce = Callable[[Listing], None]
"""Tells a user which images and classes were found."""


def convert(
    source: Source,
    out: Path,
    options: StorageOptions,
    *,
    workers: int,
    on_bad: OnBad = "error",
    max_bad: float = MAX_BAD,
    overwrite: bool = False,
    command: str = "",
    announce: Announce = lambda listing: None,
) -> DatasetManifest:
    """Convert a source; `out`, its manifest and hashes appear complete at the end, or not at all.

    The file is a function of the images and the options alone: not of the kind of source, the
    number of workers, or how often the conversion was killed and resumed. Images are ordered by
    class and then by name.

    Args:
        workers: reading and encoding threads.
        on_bad: what to do with an image that cannot be stored: stop, or skip and list it.
        max_bad: share of the images that may be skipped; a few always may.
        overwrite: replace `out`, and discard an unfinished conversion with other options.
        command: recorded in the manifest.
        announce: is told what was listed, before the work begins.

    Raises:
        ConfigError: `out` exists, an unfinished conversion has other options, or `max_bad` is none.
        DataError: the source has no images, a damaged one or too many, it has changed since it was
            listed, or `out` cannot be written.
    """
    out = target(out)
    check_out(out, overwrite=overwrite)
    check_share("--max-bad", max_bad)
    journal_path, unfinished = beside(out, JOURNAL), beside(out, PARTIAL)
    same = identity(source, options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with closing(Journal(journal_path, same, restart=overwrite)) as journal:
            renamed = journal.finished and out.exists() and not unfinished.exists()
            if out.exists() and not overwrite and not renamed:
                raise already_exists(out)
            if not renamed:
                try:
                    listing = listed(journal, source, announce)
                    how = options, workers, (on_bad, max_bad), command
                    _convert(source, listing, out, journal, *how)
                except UserError:
                    if not unfinished.exists():  # nothing is done that could be continued
                        journal_path.unlink(missing_ok=True)
                    raise
                journal.finish()
            publish(out)
        journal_path.unlink()
        return DatasetManifest.read(beside(out, MANIFEST))
    except (OSError, sqlite3.OperationalError) as error:
        raise cannot_write(out, error) from None
    except sqlite3.Error as error:
        raise damaged_journal(journal_path, error) from None


def identity(source: Source, options: StorageOptions) -> dict[str, Any]:
    """What must not change when a conversion resumes, as JSON gives it back."""
    same = {"source": [os.fspath(path) for path in source.paths], "kind": source.kind}
    return same | asdict(options) | source.options.chosen() | {"ffcv": VERSION}


def listed(journal: Journal, source: Source, announce: Announce) -> Listing:
    """List a source and tell what was found, before hours of work."""
    listing = journal.list_source(source)
    announce(listing)
    return listing


def _convert(
    source: Source,
    listing: Listing,
    out: Path,
    journal: Journal,
    options: StorageOptions,
    workers: int,
    bad: tuple[OnBad, float],
    command: str,
) -> None:
    """Write all files under their unfinished names, from where an earlier call stopped."""
    if bad[0] == "error":
        first_bad = next(journal.skipped(), None)  # of an earlier call with on_bad="skip"
        if first_bad is not None:
            journal.discard(first_bad[-1].position)
    _, begin, end, _ = journal.written()
    unfinished = beside(out, PARTIAL)
    in_place = unfinished.exists() and unfinished.stat().st_size >= end
    if not in_place or begin != first_payload(journal.totals()[0]):
        journal.discard()
    elif (damaged := _first_damaged(journal, unfinished)) is not None:
        journal.discard(damaged)
    write_listed(
        journal,
        source,
        out,
        options,
        BadImages(journal, *bad),
        workers=workers,
        classes=listing.classes,
        left_out=listing.left_out,
        command=command,
    )


def write_listed(
    journal: Journal,
    source: Source,
    out: Path,
    options: StorageOptions,
    bad: BadImages,
    *,
    workers: int,
    classes: tuple[str, ...],
    left_out: int,
    command: str,
) -> None:
    """Write what a journal lists, all files under their unfinished names, and to the disk.

    Args:
        classes: of the whole source, in label order.
        left_out: recorded in the manifest, as is `command`.
    """
    unfinished, (room, _) = beside(out, PARTIAL), journal.totals()
    _, _, end, largest = journal.written()
    with (
        closing(BetonWriter(unfinished, room=room, end=end, largest=largest)) as writer,
        _Commits(journal, writer) as commits,
    ):
        _store(journal, writer, commits, Files(source), options, workers, bad)
        counts = journal.counts()
        entered, skipped = counts["num_samples"], counts["skipped"]
        if entered + skipped != room:
            found = f"{entered} images in the file and {skipped} skipped, of {room} listed"
            raise damaged_journal(beside(out, JOURNAL), found)
        if not entered:
            raise DataError("--source", "an image that can be stored", "only bad ones")
        _write_lists(journal, out)
        writer.finish(_tables(journal))
        sha256 = file_sha256(unfinished, "hash")
    manifest = DatasetManifest(
        source=[os.fspath(path) for path in source.paths],
        kind=source.kind,
        options=asdict(options),
        selection=source.options.chosen(),
        left_out=left_out,
        classes=classes,
        class_counts=journal.class_counts(len(classes)),
        size=unfinished.stat().st_size,
        sha256=sha256,
        tables_sha256=tables_sha256(unfinished, counts["num_samples"]),
        hashes_sha256=file_sha256(beside(out, HASHES + PARTIAL)),
        ffcv=VERSION,
        command=command,
        **counts,  # type: ignore[arg-type]
    )
    manifest.write(beside(out, MANIFEST + PARTIAL))
    DatasetManifest.read(beside(out, MANIFEST + PARTIAL))  # as its readers will
    for suffix in (HASHES, *_LISTS):
        fsync(beside(out, suffix + PARTIAL))


def _first_damaged(journal: Journal, unfinished: Path) -> int | None:
    """The first image of an earlier call whose bytes are no longer those that it wrote."""
    with open_regular(unfinished) as file:
        for *_, done in journal.kept():
            file.seek(done.start)
            if hashlib.sha256(file.read(done.size)).digest() != done.sha256:
                return done.position
    return None


def _store(
    journal: Journal,
    writer: BetonWriter,
    commits: "_Commits",
    files: Files,
    options: StorageOptions,
    workers: int,
    bad: BadImages,
) -> None:
    """Read, check and write the images that are not done yet."""
    first, total = journal.written()[0], journal.totals()[0]
    work = map_in_order(partial(read_image, files, options), journal.images(first), workers=workers)
    with closing(files), closing(work), progress("convert", total, first) as bar:
        for position, (member, result) in enumerate(work, first):
            bad.enter(member.category)
            if isinstance(result, str):
                bad.skip(member, result)
                journal.add(DoneImage.skipped(position, result))
            else:
                bad.keep()
                image, sha256 = result
                start = writer.append(image.payload)
                size = image.height, image.width
                stored = start, len(image.payload), image.mode, *size, int(image.original)
                journal.add(DoneImage(position, *stored, sha256, None))
            bar.update()
            commits.advance()
    bad.enter(None)
    commits.begin()


class _Commits:
    """Commits to the journal, each after a thread has brought the payloads to the disk.

    The conversion continues meanwhile. Leaving the context commits the rest, unless the disk
    failed: after a failed fsync, Linux lets the next one succeed although data is lost.
    """

    def __init__(self, journal: Journal, writer: BetonWriter) -> None:
        self._journal, self._writer = journal, writer
        self._thread = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None
        self._last = time.monotonic()

    def advance(self) -> None:
        """Begin a commit if the last one is long ago; end it when its data is on the disk."""
        if self._sync is None:
            if time.monotonic() - self._last > _COMMIT_SECONDS:
                self.begin()
        elif self._sync.done():
            self._end()

    def begin(self) -> None:
        """Begin to commit what was added so far."""
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


ReadResult = tuple[StoredImage, bytes] | str
"""An image and its hash, or why it cannot be stored."""


def read_image(
    files: Files, options: StorageOptions, item: tuple[int, Member, bool]
) -> tuple[Member, ReadResult]:
    """Read, check and encode one image."""
    position, member, repeated = item
    if repeated:
        return member, "an image with the name of another one in its class"
    try:
        image = store_image(files.read(member), position, options)
    except UserError:
        raise  # of the source, not of this image
    except ValueError as error:
        return member, str(error)
    return member, (image, image.sha256)


def _tables(journal: Journal) -> Iterator[tuple[NDArray[np.void], NDArray[np.void]]]:
    """Metadata entries and allocations of all samples, in chunks."""
    rows, sample = journal.kept(), 0
    while chunk := list(islice(rows, _CHUNK)):
        entries, table = np.zeros(len(chunk), ENTRY_TYPE), np.zeros(len(chunk), ALLOC_TABLE_TYPE)
        stored = [done for *_, done in chunk]
        for name in ("mode", "height", "width"):
            entries["f0"][name] = [getattr(image, name) for image in stored]
        entries["f0"]["data_ptr"] = table["ptr"] = [image.start for image in stored]
        entries["f1"] = [label for label, *_ in chunk]
        table["sample_id"] = np.arange(sample, sample + len(chunk))
        table["size"] = [image.size for image in stored]
        sample += len(chunk)
        yield entries, table


def _write_lists(journal: Journal, out: Path) -> None:
    """Write the hashes of the samples, the skipped images and other files left out."""
    with beside(out, HASHES + PARTIAL).open("wb") as file:
        for _, category, name, done in journal.kept():
            file.write(hash_line(done.sha256, f"{category}/{name}"))
    with beside(out, SKIPPED + PARTIAL).open("wb") as file:
        for _, category, name, done in journal.skipped():
            file.write(list_line(f"{category}/{name}", done.reason or ""))
    with beside(out, LEFT_OUT + PARTIAL).open("wb") as file:
        file.writelines(list_line(*left_out) for left_out in journal.left_out())


def publish(out: Path) -> None:
    """Rename the files, the manifest last; resumes after a kill."""
    if beside(out, MANIFEST + PARTIAL).exists():
        beside(out, MANIFEST).unlink(missing_ok=True)  # of the file that is replaced
    for suffix in ("", HASHES, *_LISTS, MANIFEST):
        unfinished = beside(out, suffix + PARTIAL)
        if unfinished.exists():
            os.replace(unfinished, beside(out, suffix))
    for path in (beside(out, suffix) for suffix in _LISTS):
        if path.exists() and not path.stat().st_size:
            path.unlink()
    fsync(out.parent)
