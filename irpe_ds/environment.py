"""environment.json of a run folder: what ran where, read back."""

from dataclasses import dataclass, field
from pathlib import Path

from irpe_ds.config_types import Count
from irpe_ds.errors import CheckpointError
from irpe_ds.files import read_regular
from irpe_ds.schema import parse_json

ENVIRONMENT = "environment.json"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What scripts use of it; older files may lack some."""

    ranks: Count | None = None
    device: str = "?"
    commit: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    """Versions by name."""
    attention_op: dict[str, str] = field(default_factory=dict)
    """Name of the implementation, and why it was chosen."""


def read_environment(folder: Path) -> Environment:
    """The environment of a run.

    Raises:
        CheckpointError: the file cannot be read, or is another file.
    """
    path = folder / ENVIRONMENT
    try:
        text = read_regular(path, 1 << 20)
    except OSError as error:
        raise CheckpointError(path, "a run's environment", error.strerror) from None
    return parse_json(text, Environment, path, CheckpointError)
