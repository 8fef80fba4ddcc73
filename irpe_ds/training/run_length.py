"""How many updates a run has."""

from dataclasses import dataclass

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """Length of a run, in updates."""

    num_samples: int
    """Images in the training set."""
    updates_per_epoch: int
    """Whole global batches in the training set."""
    last_update: int
    """The update that training ends with."""


def run_length(config: RunConfig, num_samples: int) -> RunLength:
    """The plan of this run on so many training images.

    Raises:
        ConfigError: they do not fill one global batch.
    """
    train = config.train
    updates_per_epoch = num_samples // train.global_batch
    if not updates_per_epoch:
        expected = f"at most {num_samples}, the images in {config.data.train}"
        raise ConfigError("train.global_batch", expected, train.global_batch)
    last_update = train.epochs * updates_per_epoch
    return RunLength(
        num_samples=num_samples,
        updates_per_epoch=updates_per_epoch,
        last_update=min(last_update, train.max_updates or last_update),
    )
