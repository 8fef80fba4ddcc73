"""One case in a process of its own, with limits of time and memory."""

import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import psutil

from irpe_ds.errors import UserError

CPU_SECONDS = 10
MEMORY = 1 << 30
"""Bytes over those of the idle process."""
WALL_SECONDS = 60
"""For what waits without computing; only the slowest machine needs so many."""


class Outcome(NamedTuple):
    """How a case ended."""

    how: str
    """`read`, `error` (a clear one), or a fault: `traceback`, `signal`, `time`, `memory`."""
    text: str
    """What was read, as one comparable text; or the message."""


def run(read: Callable[[], str]) -> Outcome:
    """Call `read` in a forked process; it returns what it has read as one comparable text."""
    idle = psutil.Process().memory_info().rss
    out, own = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        _work(read, own)
    os.close(own)
    text, ended = b"", False
    while select.select([out], [], [], WALL_SECONDS)[0]:
        if not (piece := os.read(out, 1 << 16)):
            ended = True
            break
        text += piece
    os.close(out)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    if not ended:
        return Outcome("time", f"nothing after {WALL_SECONDS} s")
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Outcome("time" if name == "SIGXCPU" else "signal", name)
    peak = usage.ru_maxrss * 1024 - idle
    if peak > MEMORY:
        return Outcome("memory", f"{peak / 1e9:.1f} GB")
    return Outcome(*json.loads(text)) if text else Outcome("signal", f"exit code {status}")


def _work(read: Callable[[], str], pipe: int) -> None:
    """Read, tell how it ended, and exit without what the parent has registered for its own end."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        size = 4 * MEMORY + psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (size, size))  # threads reserve much, and use little
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        outcome = Outcome("read", read())
    except UserError as error:
        outcome = Outcome("error", str(error))
    except BaseException:
        outcome = Outcome("traceback", traceback.format_exc()[-3000:])
    with os.fdopen(pipe, "w") as file:
        file.write(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)
