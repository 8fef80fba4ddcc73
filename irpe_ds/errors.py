"""The errors that users see as a one-line message, and the exit codes of every script."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a script ended, for schedulers; docs/troubleshooting.md has the table."""

    DONE = 0
    FAILED = 1
    """Training cannot continue: a rank was lost, gradients are not finite, or a bug."""
    MISTAKE = 2
    """A user's mistake, which a restart would repeat: configuration, data, checkpoint, cluster."""
    REQUEUE = 75
    """Stopped by a signal after saving: rerun the same command. EX_TEMPFAIL of sysexits.h."""


_SHOWN = 1000  # characters of a part of a message


def printable(text: str) -> str:
    """Control characters and what is not UTF-8 as escapes: names come from files, and would else
    steer the terminal or fail to print."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _cut(part: object) -> str:
    """A part of a message as text; what was found in a file may be as long as the file."""
    text = str(part)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class UserError(ValueError):
    """A mistake that the user can fix: where it is, what was expected there and what was found.

    Where that template does not fit, `where` alone is the message, a plain sentence such as
    "cannot write checkpoint: no space left on device". Scripts print the message without a
    traceback and exit with `ExitCode.MISTAKE`.
    """

    def __init__(self, where: object, expected: str = "", got: object = None) -> None:
        template = f"{_cut(where)}: expected {expected}, got {_cut(got)}"
        text = template if expected else str(where)
        super().__init__(printable(text))
        self.where, self.expected, self.got = where, expected, got

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.where, self.expected, self.got)  # pickling between processes


class ConfigError(UserError):
    """A configuration key, a script's option or an argument of a public function."""


class DataError(UserError):
    """A source of images, a .beton file or its manifest."""


class CheckpointError(UserError):
    """A checkpoint, a weights file or a run folder."""


class ClusterError(UserError):
    """A launcher, a hostfile, a host, or a rank that is missing or differs from the others."""


class TrainingError(RuntimeError):
    """Training cannot continue, and a restart would not help; `ExitCode.FAILED`."""
