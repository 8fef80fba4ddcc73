"""What is due after an update: an evaluation, a checkpoint."""

import time

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.config_types import Interval


class Recurrence:
    """Whether something is due; the same on all ranks, which ask after every update.

    Args:
        interval: None: never.
        log_every: updates between two looks at rank 0's clock, if the interval is in minutes.
    """

    def __init__(
        self, interval: Interval | None, updates_per_epoch: int, log_every: int, ranks: Ranks
    ) -> None:
        self._minutes, self._updates = 0, 0
        if interval is not None and interval.unit == "minute":
            self._minutes = interval.count
        elif interval is not None:
            factor = updates_per_epoch if interval.unit == "epoch" else 1
            self._updates = interval.count * factor
        self._log_every, self._ranks = log_every, ranks
        self._last = time.monotonic()

    def falls_on(self, update: int) -> bool:
        """Whether it is due after this update, whenever that is."""
        return bool(self._updates) and update % self._updates == 0

    def is_due(self, update: int) -> bool:
        """Whether it is due now, after this update."""
        if not self._minutes:
            return self.falls_on(update)
        if update % self._log_every:
            return False
        elapsed = self._ranks.on_rank0(lambda: time.monotonic() - self._last)
        if elapsed < 60 * self._minutes:
            return False
        self._last = time.monotonic()
        return True
