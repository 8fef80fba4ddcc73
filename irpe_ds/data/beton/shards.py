"""A source of images -> a sharded .beton, by any number of processes on any number of hosts.

They share a file system and nothing else. One of them lists the source and publishes the list, cut
into shards, so that a network folder is walked once. Each shard is a function of its part of the
list and of the options: claims (claims.py) divide the work up, but nothing depends on them, since
two processes that write one shard write the same bytes, under names of their own, and rename them.

A killed process loses the shard that it was at, a part of the whole, so no journal is kept.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from irpe_ds.config_types import Natural
from irpe_ds.data.beton.claims import DONE, Claims, Task
from irpe_ds.data.beton.convert import Announce, identity, listed, publish, write_listed
from irpe_ds.data.beton.journal import Journal, of_another
from irpe_ds.data.beton.left_out import list_line
from irpe_ds.data.beton.manifest import (
    HASHES,
    LEFT_OUT,
    MANIFEST,
    SHARDING,
    SKIPPED,
    DatasetManifest,
    FileRecord,
    Sha256,
    beside,
    file_hashes,
    file_sha256,
    read_manifest,
    shard_path,
)
from irpe_ds.data.beton.options import MAX_BAD, OnBad, StorageOptions, check_shards, check_share
from irpe_ds.data.beton.skipping import BadImages, check_all
from irpe_ds.data.beton.sources import Source
from irpe_ds.errors import ConfigError, DataError
from irpe_ds.files import fsync, open_regular, read_regular, replace_file
from irpe_ds.schema import parse_json

_NEW = "the name of a new data set"
_LISTING = "listing"
_SHARD = "shard-"
_SETTINGS = "settings.json"
_SETTINGS_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class SharedListing:
    """What all processes take from the one that has listed the source."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    """What must be the same for all of them: source, options, versions, number of shards."""
    command: str
    """For the manifests, which then do not depend on who writes them."""
    classes: tuple[str, ...]
    """Of the whole source, in label order."""
    counts: tuple[Natural, ...]
    """Images of each class."""
    left_out: Natural
    """Source files without an image extension."""
    lists: tuple[Sha256, ...]
    """Hash of the list of each shard."""


def convert_shards(
    source: Source,
    out: Path,
    options: StorageOptions,
    shards: int,
    *,
    workers: int,
    on_bad: OnBad = "error",
    max_bad: float = MAX_BAD,
    command: str = "",
    announce: Announce = lambda listing: None,
) -> DatasetManifest:
    """Convert a source to shards together with all processes that call this with the same values.

    Returns when the set is complete, whoever wrote it. The files are a function of the images, the
    options and the number of shards alone; the samples are those of `convert`, in its order. The
    shards are equal in their number of images, within one. What other processes have written since
    a kill is kept; the list of the source is too.

    Args:
        out: names the set. Its index appears last: beside(out, MANIFEST).
        workers: reading and encoding threads of this process.
        on_bad: as of `convert`; so is `max_bad`, a share of the whole source.
        command: recorded in the manifests, of the process that lists the source.
        announce: is told by that process what was listed.

    Raises:
        ConfigError: `out` exists, or other processes have other values.
        DataError: the source has no images or a damaged one, or a file cannot be written.
    """
    check_shards(shards)
    folder = beside(out, SHARDING)
    settings = identity(source, options) | {"shards": shards}
    check_share("--max-bad", max_bad)
    bad = on_bad, max_bad
    try:
        if not _is_complete(out, settings):
            folder.mkdir(parents=True, exist_ok=True)
            with Claims(folder) as claims:
                how = workers, bad, command, announce
                _Conversion(source, out, options, settings, claims, *how).run()
        shutil.rmtree(folder, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        if beside(out, MANIFEST).exists():  # another process is done, and has removed the folder
            return DatasetManifest.read(beside(out, MANIFEST))
        done = "finished shards are kept; rerun the same command to continue"
        raise DataError(f"--out: cannot write {out}: {error}; {done}") from None
    return DatasetManifest.read(beside(out, MANIFEST))


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether this very set is.

    Raises:
        ConfigError: there is another data set of this name.
    """
    manifest = read_manifest(out)
    if out.exists() or (manifest is not None and not manifest.shards):
        old_file = out if out.exists() else beside(out, MANIFEST)
        raise ConfigError("--out", _NEW, f"{old_file}, which exists")
    if manifest is None:
        return False
    old = {"source": manifest.source, "kind": manifest.kind, "ffcv": manifest.ffcv}
    old |= manifest.options | manifest.selection | {"shards": len(manifest.shards)}
    if old != settings:
        raise of_another(f"--out: {out} (which exists; remove its files)", old, settings)
    return True


class _Conversion:
    """The part of one process."""

    def __init__(
        self,
        source: Source,
        out: Path,
        options: StorageOptions,
        settings: dict[str, Any],
        claims: Claims,
        workers: int,
        bad: tuple[OnBad, float],
        command: str,
        announce: Announce,
    ) -> None:
        self._source, self._out, self._options = source, out, options
        self._settings, self._claims = settings, claims
        self._workers, self._bad, self._command = workers, bad, command
        self._announce = announce
        self._folder, self._count = beside(out, SHARDING), int(settings["shards"])
        self._list = self._folder / (_LISTING + DONE)
        self._shards = [shard_path(out, number, self._count) for number in range(self._count)]

    def run(self) -> None:
        """Work until the set is complete."""
        index = beside(self._out, MANIFEST)
        self._claims.share([Task(_LISTING, self._publish_list)], index.exists)
        if index.exists():
            return
        listing = self._read_listing()
        tasks = [
            Task(f"{_SHARD}{n:05d}", partial(self._write_shard, listing, n))
            for n in range(self._count)
        ]
        self._claims.share(tasks, index.exists)
        self._claims.share([Task("index", partial(self._write_index, listing))], index.exists)

    def _publish_list(self) -> None:
        """List the source; the folder with the lists appears at once and complete."""
        old = next((path for path in self._shards if path.exists()), None)
        if old is not None:
            raise ConfigError("--out", _NEW, f"{old}, which exists")
        made = self._claims.own / _LISTING
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        with closing(Journal(None, {})) as journal:
            found = listed(journal, self._source, self._announce)
            total, count = journal.totals()[0], self._count
            if total < count:
                raise ConfigError("--shards", f"at most {total}, the images there are", count)
            bounds = [total * number // count for number in range(count + 1)]
            lists = [
                _write_lines(made / str(number), journal.listed(*bounds[number : number + 2]))
                for number in range(count)
            ]
            with (made / LEFT_OUT).open("wb") as file:
                file.writelines(list_line(*each) for each in journal.left_out())
        listing = SharedListing(
            settings=self._settings,
            command=self._command,
            classes=found.classes,
            counts=found.counts,
            left_out=found.left_out,
            lists=tuple(lists),
        )
        text = json.dumps(asdict(listing))
        replace_file(made / _SETTINGS, f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
        fsync(made)
        try:
            os.rename(made, self._list)
        except OSError:
            if not self._list.exists():  # another process was faster
                raise

    def _read_listing(self) -> SharedListing:
        path = self._list / _SETTINGS
        text, _, sha256 = read_regular(path, _SETTINGS_BYTES).removesuffix(b"\n").rpartition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != sha256:
            raise _damaged(path)
        listing = parse_json(text, SharedListing, path, DataError)
        if listing.settings != self._settings:
            where = f"{self._folder} (of an unfinished conversion; remove it to start over)"
            raise of_another(where, listing.settings, self._settings)
        return listing

    def _write_shard(self, listing: SharedListing, number: int) -> None:
        shard = self._shards[number]
        own = self._claims.own / shard.name
        with closing(Journal(None, {})) as journal:
            journal.load(_read_lines(self._list / str(number), listing.lists[number]))
            categories = [member.category for _, member in journal.members()]
            ends = categories[0], categories[-1]  # their other images may be in other shards
            write_listed(
                journal,
                self._source,
                own,
                self._options,
                BadImages(journal, *self._bad, sum(listing.counts), ends),
                workers=self._workers,
                classes=listing.classes,
                left_out=0,  # they belong to no shard: the index counts them
                command=listing.command,
            )
        publish(own)
        if self._is_done(number):
            return  # by another process, meanwhile: it may be in use already
        for suffix in ("", HASHES, SKIPPED, MANIFEST):
            if beside(own, suffix).exists():
                os.replace(beside(own, suffix), beside(shard, suffix))
        fsync(shard.parent)
        self._mark(number).touch()
        names = os.listdir(self._folder)
        finished = sum(name.startswith(_SHARD) and name.endswith(DONE) for name in names)
        print(f"{shard.name}: {finished} of {self._count} shards are finished", file=sys.stderr)

    def _mark(self, number: int) -> Path:
        return self._folder / f"{_SHARD}{number:05d}{DONE}"

    def _is_done(self, number: int) -> bool:
        return self._mark(number).exists()

    def _write_index(self, listing: SharedListing) -> None:
        """Write the lists of what is not in the set and, last, the index."""
        own = self._claims.own / self._out.name
        skipped, records = beside(own, SKIPPED), list[FileRecord]()
        counts, changed, left = [0] * len(listing.classes), 0, 0
        with skipped.open("wb") as file:
            for shard in self._shards:
                manifest = read_manifest(shard)
                if manifest is None:
                    expected = "the shards that are written (remove it to start over)"
                    raise DataError(self._folder, expected, f"no {shard.name}")
                record = {field.name: getattr(manifest, field.name) for field in fields(FileRecord)}
                records.append(FileRecord(**record))
                counts = [a + b for a, b in zip(counts, manifest.class_counts, strict=True)]
                changed, left = changed + manifest.changed, left + manifest.skipped
                if manifest.skipped:
                    with open_regular(beside(shard, SKIPPED)) as lines:
                        shutil.copyfileobj(lines, file)
        classes = zip(listing.classes, listing.counts, counts, strict=True)
        check_all(classes, left, self._bad[1])
        index = DatasetManifest(
            source=self._settings["source"],
            kind=self._settings["kind"],
            options=asdict(self._options),
            selection=self._source.options.chosen(),
            num_samples=sum(record.num_samples for record in records),
            changed=changed,
            skipped=left,
            duplicates=self._duplicates(records),
            left_out=listing.left_out,
            classes=listing.classes,
            class_counts=tuple(counts),
            size=sum(record.size for record in records),
            sha256=_joint(record.sha256 for record in records),
            tables_sha256=_joint(record.tables_sha256 for record in records),
            hashes_sha256=_joint(record.hashes_sha256 for record in records),
            ffcv=self._settings["ffcv"],
            command=listing.command,
            shards=tuple(records),
        )
        index.write(beside(own, MANIFEST))
        DatasetManifest.read(beside(own, MANIFEST))  # as its readers will
        if listing.left_out:
            shutil.copyfile(self._list / LEFT_OUT, beside(own, LEFT_OUT))
        for suffix, count in ((SKIPPED, left), (LEFT_OUT, listing.left_out)):
            if count:
                fsync(beside(own, suffix))
                os.replace(beside(own, suffix), beside(self._out, suffix))
        os.replace(beside(own, MANIFEST), beside(self._out, MANIFEST))
        fsync(self._out.parent)

    def _duplicates(self, records: list[FileRecord]) -> int:
        """Images whose payload is also that of another image; counted on disk, as by a journal."""
        with closing(sqlite3.connect("")) as db:
            db.execute("CREATE TABLE hashes (sha256 BLOB)")
            for shard, record in zip(self._shards, records, strict=True):
                found = file_hashes(shard, record.hashes_sha256)
                db.executemany("INSERT INTO hashes VALUES (?)", ((line.sha256,) for line in found))
            query = "SELECT count(*) - count(DISTINCT sha256) FROM hashes"
            return int(db.execute(query).fetchone()[0])


def _write_lines(path: Path, lines: Iterator[str]) -> str:
    """Write lines to the disk; their hash."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for line in lines:
            file.write(data := line.encode())
            digest.update(data)
    fsync(path)
    return digest.hexdigest()


def _read_lines(path: Path, sha256: str) -> Iterator[str]:
    if file_sha256(path) != sha256:
        raise _damaged(path)
    with path.open() as file:
        yield from file


def _damaged(path: Path) -> DataError:
    folder = path.parent.parent
    return DataError(path, f"the list of the source (remove {folder} to start over)", "damage")


def _joint(hashes: Iterator[str]) -> str:
    return hashlib.sha256("".join(f"{sha256}\n" for sha256 in hashes).encode()).hexdigest()
