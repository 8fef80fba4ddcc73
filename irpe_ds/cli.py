"""How every script ends on a user's mistake."""

import faulthandler
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from irpe_ds.errors import ExitCode, TrainingError, UserError

EXTRAS = {
    "train": ("deepspeed", "psutil", "pydantic"),
    "data": ("cv2", "ffcv", "numba", "scipy", "sklearn"),
    "log": ("matplotlib", "tensorboard", "wandb"),
    "parquet": ("pyarrow",),
}
"""Packages that `import irpe_ds` does without, by the extra of setup.py that installs them."""

UNREAD = 128 + signal.SIGPIPE
"""The exit code of a script whose output nobody reads any more, as a shell gives it."""


def end_process(code: ExitCode) -> NoReturn:
    """Exit at once, without Python's shutdown, once everything is written.

    CPython before 3.14 ends a daemon thread with pthread_exit when it wants the GIL at shutdown;
    where C++ is on its stack that is std::terminate. Seen once in a run that was complete:
    "terminate called without an active exception", and SIGABRT as its exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a closed pipe
            stream.flush()
    os._exit(code)


def command(script: str) -> str:
    """What a user types to start one of our scripts, such as launch/curves.py, from here.

    Its path where that leads to it, in a clone of the repository; elsewhere the console command.
    """
    return f"python {script}" if Path(script).is_file() else f"irpe-ds {Path(script).stem}"


@contextmanager
def _while_read() -> Iterator[None]:
    """End quietly once nobody reads what is printed, as in `irpe-ds zoo | head`."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # now: at Python's shutdown it would be a traceback
    except BrokenPipeError:
        outputs = select.poll()
        for number in (1, 2):
            outputs.register(number, 0)
        unread = [number for number, event in outputs.poll(0) if event & select.POLLERR]
        if not unread:  # another pipe, or a socket
            raise
        for number in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # Python flushes them again
        sys.exit(UNREAD)


@_while_read()
def run(main: Callable[[], None]) -> None:
    """Call main; user errors become one message on stderr and an exit code, not a traceback.

    It ends quietly when what reads its output has ended, as `head` does. Each rank prints its own
    error: a launcher may kill the others before they can. A crash, such as SIGSEGV, shows the line
    that was running.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable()
    # Of PyTorch, which has not been imported: when rank 0 ends, the others' waits for its store
    # end with ten lines of C++ each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, names in EXTRAS.items() if missing in names), None)
        if extra is None:
            raise
        _exit(UserError(f"{missing} is not installed: pip install 'irpe-ds[{extra}]'"))
    except (TrainingError, UserError) as error:
        _exit(error)


def _exit(error: TrainingError | UserError) -> NoReturn:
    distributed = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    rank = f"[rank {os.environ['RANK']}] " if distributed else ""
    sys.stderr.write(f"{rank}error: {error}\n")
    sys.stderr.flush()
    sys.exit(ExitCode.MISTAKE if isinstance(error, UserError) else ExitCode.FAILED)
