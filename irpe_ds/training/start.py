"""Where a run begins: anew, or from a checkpoint."""

import fcntl
import tempfile
from pathlib import Path
from typing import NamedTuple, TextIO

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.config import ModelConfig, RunConfig
from irpe_ds.errors import CheckpointError
from irpe_ds.runlog import METRICS
from irpe_ds.training import checkpoint


class Start(NamedTuple):
    """Where a run begins."""

    path: Path | None
    """The checkpoint to go on from; None to start anew."""
    saved: checkpoint.Manifest
    """Its manifest, or that of the run before its first update."""
    notes: list[str]
    """What the log should say about it."""


def find_start(config: RunConfig, resume: str, present: checkpoint.Manifest) -> Start:
    """Where to go on from.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or another model's, or a run is
            there already that would be overwritten.
    """
    folder = config.folder / checkpoint.FOLDER
    there = (config.folder / METRICS).exists()
    if resume == "never":
        if there:
            expected = "a new run: --resume auto goes on with this one, name=... starts another"
            raise CheckpointError(config.folder, expected, "the folder of a run")
        return Start(None, present, [])
    if resume == "auto" or Path(resume).resolve().parent == folder.resolve():
        path, damaged = checkpoint.newest_good(folder)
        if resume != "auto" and (path is None or Path(resume).resolve() != path.resolve()):
            expected = f"its newest undamaged checkpoint ({path}), or name=... to start another run"
            raise CheckpointError(config.folder, expected, resume)
    else:
        path, damaged = Path(resume), []
        if not path.is_dir():
            raise CheckpointError("--resume", "auto or the folder of a checkpoint", resume)
        if any(folder.glob("update-*")):
            expected = "--resume auto, or name=... to start another run from a checkpoint"
            raise CheckpointError(config.folder, expected, resume)
        if found := checkpoint.fault(path):
            raise CheckpointError("--resume", "an undamaged checkpoint", f"{path}: {found}")
    notes = [f"damaged, not used: {text}" for text in damaged]
    if path is None:
        return Start(None, present, ["no checkpoint yet: starting anew"] if there else [])
    saved = checkpoint.check(path, present)
    changes = "; ".join(checkpoint.changes(saved, present))
    notes.append(f"going on from {path}" + (f" with {changes}" if changes else ""))
    return Start(path, saved, notes)


class FolderLock:
    """While entered, no other run writes into the run folder; the kernel ends it with the process.

    Raises:
        CheckpointError: on all ranks, where another run does.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks

    def __enter__(self) -> None:
        self._ranks.on_rank0(self._take)

    def __exit__(self, *_: object) -> None:
        if self._ranks.is_main:
            self._file.close()

    def _take(self) -> None:
        self._file = lock(self._folder)


def lock(folder: Path) -> TextIO:
    """A file of the folder that is this process's alone until it is closed.

    Raises:
        CheckpointError: it is another's, or cannot be locked.
    """
    try:
        file = (folder / ".lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        expected = "a run folder that no other run is writing into"
        raise CheckpointError(folder, expected, "one that is at work") from None
    except OSError as error:
        expected = "a file system on which files can be locked (flock)"
        raise CheckpointError(folder, expected, error.strerror) from None
    return file


def first_model(config: RunConfig, resume: str) -> ModelConfig:
    """The model to build: where a checkpoint will be loaded, without the weights to start from."""
    own = (config.folder / checkpoint.FOLDER).glob("update-*")
    anew = resume == "never" or (resume == "auto" and not any(own))
    return config.model if anew else config.model.model_copy(update={"weights": None})


def check_folder(config: RunConfig) -> None:
    """Make the run folder; raise CheckpointError where nothing can be written."""
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.folder):
            pass
    except OSError as error:
        got = f"{config.folder}: {error.strerror}"
        raise CheckpointError("output", "a folder that can be written", got) from None
