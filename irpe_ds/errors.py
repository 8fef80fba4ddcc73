"""The errors that a user gets to read as one message, and the exit codes of every script."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a scheduler can tell from how a script ended; README has the same table."""

    DONE = 0
    FAILED = 1
    """Training cannot go on: a rank is lost, gradients are not finite, or a fault of ours."""
    MISTAKE = 2
    """A mistake that starting again would not mend: configuration, data, checkpoint, cluster."""
    REQUEUE = 75
    """Stopped by a signal and saved: the same command goes on. EX_TEMPFAIL of sysexits.h."""


class UserError(ValueError):
    """A mistake that its user can mend: where it is, what was expected there and what came.

    Where this template does not fit, `where` alone is the message, a plain sentence such as
    "cannot write checkpoint: no space left on device". Launch scripts print the message without a
    traceback and exit with `ExitCode.MISTAKE`.
    """

    def __init__(self, where: object, expected: str = "", got: object = None) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}" if expected else str(where))
        self.where, self.expected, self.got = where, expected, got

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.where, self.expected, self.got)  # to cross between processes


class ConfigError(UserError):
    """A key of the configuration, an option of a script or an argument of a public function."""


class DataError(UserError):
    """A source of images, a .beton file or what lies beside it."""


class CheckpointError(UserError):
    """A checkpoint, a file of weights or a run folder."""


class ClusterError(UserError):
    """A launcher, a hostfile, a host, or a rank that differs from the others or is absent."""


class TrainingError(RuntimeError):
    """Training cannot go on, and starting it again would not help; `ExitCode.FAILED`."""
