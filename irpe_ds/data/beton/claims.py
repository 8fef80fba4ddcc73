"""Processes of any number of hosts divide tasks up, with a shared folder as the only means.

A process claims a task by creating a file, and touches it every few seconds. Others take the claim
over when its process has given up, is gone, which its own machine knows at once, or has not touched
it for a minute by the observer's own clock: clocks of different machines, or that of the file
system, are never compared, and no locks are needed, which not every network file system has.

A claim only saves work. A process that was silent for a minute and then goes on does a task that
another does too: whoever uses this must make that harmless.
"""

import json
import os
import random
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, NamedTuple

from pydantic import Field

from irpe_ds.config_types import Count
from irpe_ds.errors import DataError, UserError
from irpe_ds.files import read_regular
from irpe_ds.schema import parse_json

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # 12 beats; a network file system may hide the last ones for a while
POLL_SECONDS = 2.0
_LOOKED_AT = 8  # claims of others at a poll: hundreds of waiting processes ask one file server
_BYTES = 1 << 12  # of a claim; it has some 200

DONE = ".done"
_CLAIM = ".claim"
_GIVEN_UP = b"given up"  # in a claim whose process has failed


class Task(NamedTuple):
    """Something that one of the processes is to do."""

    name: str
    """A file name; the task is done when the folder has an entry `name` + DONE."""
    do: Callable[[], None]
    """Does it and makes that entry, or finds that another process has."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that has claimed a task."""

    name: Annotated[str, Field(pattern=r"^[^/]+\.[0-9]+\.[0-9a-f]{8}$")]
    """Of its own folder in the shared one."""
    machine: str
    """Where its process number means something."""
    host: str
    pid: Count
    started: str
    """When it started, as /proc has it: its number may have been given to another since."""


class Claims:
    """The claims of this process in a shared folder; it has a folder of its own there.

    Args:
        folder: the shared folder; exists.
    """

    def __init__(self, folder: Path) -> None:
        host, pid = socket.gethostname(), os.getpid()
        name = f"{host}.{pid}.{secrets.token_hex(4)}"
        self._me = Owner(
            name=name,
            machine=_machine(),
            host=host,
            pid=pid,
            started=_start_time(pid) or "",
        )
        self._folder, self.own = folder, folder / name
        self._held: Path | None = None
        self._seen = dict[Path, tuple[tuple[int, bytes], float]]()
        self._closed = Event()
        self._thread = Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self.own.mkdir()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        shutil.rmtree(self.own, ignore_errors=True)

    def share(self, tasks: Sequence[Task], is_over: Callable[[], bool]) -> None:
        """Do tasks together with the other processes, until all are done or all is over.

        Tasks that nobody has claimed come first: one that has failed elsewhere waits until the
        others are done.

        Raises:
            OSError: the folder cannot be written to, or has been removed.
        """
        told = False
        while not is_over() and (tasks := self._undone(tasks)):
            task = self._claim(tasks)
            if task is not None:
                self._do(task, is_over)
                continue
            if not told:
                print(self._waiting(tasks), file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def _undone(self, tasks: Sequence[Task]) -> list[Task]:
        found = frozenset(os.listdir(self._folder))
        return [task for task in tasks if task.name + DONE not in found]

    def _do(self, task: Task, is_over: Callable[[], bool]) -> None:
        try:
            if self._undone([task]):
                task.do()
        except (OSError, UserError):
            # Another process may have done it since, and removed what this one was writing.
            if self._undone([task]) and not is_over():
                raise
        finally:
            held, self._held = self._held, None
            with suppress(OSError):
                if held is not None and self._undone([task]):
                    held.write_bytes(_GIVEN_UP)

    def _claim(self, tasks: Sequence[Task]) -> Task | None:
        """Claim one of the tasks, if one is free or its process is gone."""
        taken = frozenset(os.listdir(self._folder))
        for task in tasks:
            if task.name + _CLAIM not in taken and self._create(self._path(task)):
                return task
        for task in random.sample(tasks, min(len(tasks), _LOOKED_AT)):
            if self._take_over(self._path(task)):
                return task
        return None

    def _path(self, task: Task) -> Path:
        return self._folder / (task.name + _CLAIM)

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileExistsError, FileNotFoundError):  # another has it; or all is over
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(self._me), file)
        self._held = path
        return True

    def _take_over(self, path: Path) -> bool:
        """Replace the claim of a process that is gone."""
        try:
            # Opened: a network file system may answer a mere stat from its cache.
            text = read_regular(path, _BYTES)
            seen = path.stat().st_mtime_ns, text
        except OSError:
            return False
        owner, now = _owner(text), time.monotonic()
        first, since = self._seen.get(path, (None, now))
        if first != seen:
            self._seen[path] = seen, (since := now)
        is_dead = owner is not None and self._is_dead(owner)
        if not (is_dead or text == _GIVEN_UP) and now - since < STALE_SECONDS:
            return False
        taken = self.own / path.name
        try:
            os.rename(path, taken)  # of several processes, one succeeds
        except FileNotFoundError:
            return False
        if taken.read_bytes() != text:  # a new claim: another process has replaced the old one
            os.rename(taken, path)
            return False
        if is_dead and owner is not None:
            shutil.rmtree(self._folder / owner.name, ignore_errors=True)
        return self._create(path)

    def _is_dead(self, owner: Owner) -> bool:
        """Whether a process of this machine is gone; those of others may always be alive."""
        if owner.machine != self._me.machine:
            return False
        return _start_time(owner.pid) != owner.started

    def _waiting(self, tasks: Sequence[Task]) -> str:
        shown = tasks[: 1 if len(tasks) > 3 else 3]
        owners = []
        for task in shown:
            with suppress(OSError):
                owner = _owner(read_regular(self._path(task), _BYTES))
                if owner is not None:
                    owners.append(f"{task.name} by {owner.host} (process {owner.pid})")
        others = f" and {len(tasks) - len(shown)} more" if len(tasks) > len(shown) else ""
        return f"waiting for other processes: {', '.join(owners)}{others}"

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            if (held := self._held) is not None:
                with suppress(OSError):  # taken over, or over
                    os.utime(held)


def _owner(text: bytes) -> Owner | None:
    """None: a claim that is just being written, or whose process died meanwhile."""
    try:
        return parse_json(text, Owner, "", DataError)
    except DataError:
        return None


def _machine() -> str:
    """What tells process numbers apart: the boot of a machine, and the namespace of a container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str | None:
    """When a process of this machine started; None if there is none, or a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
