"""Copies of data sets on a node's own disk."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from irpe_ds.data.beton.manifest import (
    HASHES,
    MANIFEST,
    FileRecord,
    beside,
    find_beside,
    read_manifest,
)
from irpe_ds.data.parallel import progress
from irpe_ds.errors import DataError
from irpe_ds.files import atomic_write, lock_file, open_regular

_LOCK = "lock"
_PARTIAL = ".partial"
_CHUNK_BYTES = 1 << 22
_THREADS = 4  # that copy shards: one rarely has all of what a network and a disk give


def staged(path: Path, folder: Path, where: str) -> Path:
    """The copy of a data set, a .beton or one of several shards, in a folder; made if need be.

    It is FOLDER/NAME-HASH/NAME, with the hash of its contents. A file is compared with the SHA-256
    of the manifest while it is copied, and gets its name when it is whole: what was interrupted
    goes on with the files that are missing. Processes that want the same copy wait for the one that
    makes it.

    Args:
        where: the configuration key that names the data set, for errors.

    Raises:
        DataError: the data set has no manifest or differs from it, or cannot be copied.
    """
    manifest = read_manifest(path)
    if manifest is None:
        expected = "a .beton file with its manifest beside it, as data.stage copies no other"
        raise DataError(where, expected, path)
    place = folder / f"{path.stem}-{manifest.sha256[:12]}" / path.name
    files = [(file, place.with_name(file.name), record) for file, record in manifest.files(path)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(place.with_name(_LOCK), wait=True):
            _copy_all(where, [each for each in files if not _is_there(*each[1:])])
            # The set's own manifest is the last: with it there is a data set.
            for source, copy in {**{file: copy for file, copy, _ in files}, path: place}.items():
                for suffix in (HASHES, MANIFEST):
                    if (found := find_beside(source, suffix)).exists():
                        with atomic_write(beside(copy, suffix)) as unfinished:
                            shutil.copyfile(found, unfinished)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename or place.parent}"
        raise DataError(f"data.stage: cannot copy {path} to {place.parent}: {reason}") from None
    return place


def _is_there(copy: Path, record: FileRecord) -> bool:
    return copy.exists() and copy.stat().st_size == record.size


def _copy_all(where: str, files: Sequence[tuple[Path, Path, FileRecord]]) -> None:
    """Copy files to their new places; stops at the first error."""
    if not files:
        return
    for _, copy, _ in files:
        beside(copy, _PARTIAL).unlink(missing_ok=True)  # of a process that was killed
    folder, needed = files[0][1].parent, sum(record.size for *_, record in files)
    free = shutil.disk_usage(folder).free
    if free < needed:
        expected = f"a disk with {needed / 1e9:,.1f} GB free"
        raise DataError("data.stage", expected, f"{folder} with {free / 1e9:,.1f} GB")
    with (
        progress(f"{where} to data.stage", needed, unit="B") as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        try:
            for copied in [pool.submit(_copy, *each, bar.update) for each in files]:
                copied.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy(file: Path, copy: Path, record: FileRecord, report: Callable[[int], object]) -> None:
    unfinished, digest = beside(copy, _PARTIAL), hashlib.sha256()
    with open_regular(file) as source, unfinished.open("wb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
            report(len(chunk))
        target.flush()
        os.fsync(target.fileno())
    if digest.hexdigest() != record.sha256:
        unfinished.unlink()
        raise DataError(file, f"the SHA-256 of its manifest, {record.sha256}", "another")
    unfinished.rename(copy)
