"""Saves checkpoints behind training, which stands still only while they are copied to host memory.

Every rank writes and hashes its own shards in a thread. Rank 0 waits for all of them, which it sees
in the folder that all ranks share, and then makes the checkpoint visible under its name. What a
save that was cut short has left is removed by the next.
"""

import json
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread, main_thread

from irpe_ds.checkpoint import reader
from irpe_ds.checkpoint.manifest import (
    CheckpointManifest,
    SavedFile,
    shard_names,
    write_manifest,
)
from irpe_ds.checkpoint.shards import Shard, write_shards
from irpe_ds.cluster.process_group import Ranks
from irpe_ds.errors import CheckpointError, ClusterError
from irpe_ds.files import fsync, read_regular, replace_file
from irpe_ds.schema import parse_json

POLL_SECONDS = 0.1
"""How often rank 0 looks for the files of the others."""
GRACE_SECONDS = 20.0
"""How long it does so when it has nothing else to do: a rank that was killed writes nothing."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; all ranks call its methods together.

    Args:
        folder: the run's folder of checkpoints.
        keep: how many to keep, besides the best.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._saving: _Save | None = None

    def start(self, manifest: CheckpointManifest, shards: Mapping[str, Shard]) -> None:
        """Begin to write a checkpoint; the one before must be finished.

        Args:
            shards: this rank's part of the state by kind.NAME, copied to the CPU: they are not to
                change until it is finished.

        Raises:
            CheckpointError: on all ranks, if rank 0 cannot create the folder.
        """
        assert self._saving is None
        hidden = self._ranks.on_rank0(partial(_prepare, self._folder, manifest.update))
        self._ranks.run_checked(partial(_check_shared, hidden))
        self._saving = _Save(hidden, manifest, shards, self._ranks, self._keep)

    def finish(self) -> CheckpointManifest | None:
        """Wait for the checkpoint that is being written; its manifest, None if there is none.

        Raises:
            CheckpointError: on all ranks, if a rank could not write it; earlier checkpoints are
                unchanged.
        """
        if self._saving is None:
            return None
        save, self._saving = self._saving, None
        try:
            self._ranks.run_checked(save.wait_for_own)
        except CheckpointError:
            save.cancelled.set()
            raise
        return self._ranks.on_rank0(save.wait_for_all)


def _prepare(folder: Path, update: int) -> Path:
    """Create a hidden folder for a checkpoint, and remove what earlier saves have left."""
    path = reader.path_of(folder, update)
    # No other save has this name: a rank that reads the folder late sees no older save's files.
    hidden = folder / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".update-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another process may still read it
        hidden.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint: {path}: {error}") from None
    return hidden


def _check_shared(hidden: Path) -> None:
    if not hidden.is_dir():
        expected = "a run folder that all nodes share"
        raise ClusterError(hidden.parent, expected, f"a node without {hidden.name}")


class _Save:
    """One checkpoint on its way to the disk."""

    def __init__(
        self,
        hidden: Path,
        manifest: CheckpointManifest,
        shards: Mapping[str, Shard],
        ranks: Ranks,
        keep: int,
    ) -> None:
        self._hidden, self._manifest, self._keep = hidden, manifest, keep
        self._path = reader.path_of(hidden.parent, manifest.update)
        self.cancelled = Event()
        self._names = shard_names(ranks.world_size)
        self._own: Future[None] = Future()
        self._all: Future[CheckpointManifest] = Future()
        # Not a daemon: a rank that ends over an error writes its part first.
        Thread(target=self._write, args=(shards, ranks.rank)).start()

    def wait_for_own(self) -> None:
        """Wait for this rank's file."""
        self._own.result()

    def wait_for_all(self) -> CheckpointManifest:
        """Wait until the checkpoint is visible; only on rank 0."""
        return self._all.result()

    def _write(self, shards: Mapping[str, Shard], rank: int) -> None:
        file = self._hidden / self._names[rank]
        try:
            written = write_shards(file, shards)
            del shards  # their memory
            replace_file(_record(file), json.dumps(written))
        except Exception as error:
            self._own.set_exception(self._failure(error))
            return
        self._own.set_result(None)
        if rank == 0:
            try:
                self._all.set_result(self._commit())
            except Exception as error:
                self._all.set_exception(self._failure(error))

    def _failure(self, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        return CheckpointError(f"cannot write checkpoint: {self._path}: {error}")

    def _commit(self) -> CheckpointManifest:
        """Make the checkpoint visible once all files are on disk, and remove old ones."""
        files = {name: self._wait_for(self._hidden / name) for name in self._names}
        manifest = replace(self._manifest, files=files, world_size=len(files))
        write_manifest(self._hidden, manifest)
        fsync(self._hidden)
        _remove(self._path)  # a damaged one that was skipped
        self._hidden.rename(self._path)
        fsync(self._path.parent)
        _prune(self._path, self._keep)
        return manifest

    def _wait_for(self, file: Path) -> SavedFile:
        """Bytes and hash of a rank's file, once it is on disk."""
        record, patience = _record(file), GRACE_SECONDS
        while not record.exists():
            if not main_thread().is_alive():  # this rank is ending
                patience -= POLL_SECONDS
            if self.cancelled.wait(POLL_SECONDS) or patience < 0:
                raise OSError("another rank has not written its part")
        written = read_record(record)
        record.unlink()
        return written


def _record(file: Path) -> Path:
    """Where a rank says that its file is on disk."""
    return file.with_suffix(".json")


def read_record(path: Path) -> SavedFile:
    """What a rank says of its file; raises CheckpointError or OSError."""
    return parse_json(read_regular(path, 1000), SavedFile, path, CheckpointError)


def _prune(newest: Path, keep: int) -> None:
    """Remove all up to `newest` except the last `keep` and the best.

    Later ones are damaged: training resumed from an earlier one, and will overwrite them.
    """
    paths = [path for path in reader.complete(newest.parent) if path.name <= newest.name]
    best = reader.best_of(paths)
    for old in paths[:-keep]:
        if old != best or reader.score_of(old) < 0:
            _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that a kill or a reader leaves no half of one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
