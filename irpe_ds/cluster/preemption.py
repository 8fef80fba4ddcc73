"""A signal to one rank stops all ranks after the same update, without a collective."""

import sys
from contextlib import suppress
from datetime import timedelta
from threading import Event, Lock, Thread
from types import TracebackType

from torch.distributed import DistStoreError

from irpe_ds.cluster.heartbeat import Heartbeat
from irpe_ds.cluster.process_group import Ranks
from irpe_ds.cluster.signals import StopSignals

REQUESTED, SYNC_POINT = "stop requested", "sync point"
"""Keys of the store: that a rank has received a signal, and the call at which all stop."""
NEVER = sys.maxsize
"""A call that no rank makes."""
WAIT = timedelta(days=20)
"""For a key of the store; it waits in poll(2), whose longest time is 24 days."""
PATIENCE = 0.5
"""Share of the heartbeat's silence for which rank 0 waits for promises: launchers kill 30 s after
the signal."""
GRACE_SECONDS = 2.0
"""For which a rank that ends with an error waits for the others' answers."""


class PreemptionSync:
    """While entered, agrees on a sync point: the call of `reached` at which all ranks stop.

    Every rank makes the same calls, one after each update and each batch of an evaluation, but some
    are ahead of others. When a rank has received a signal, a thread of each rank promises that its
    rank makes at most one more call before it knows the sync point, and says which. The sync point
    is the last of those calls: no rank has passed it. JAX's preemption sync manager does the same.

    Until then nothing is sent: the threads wait for one key of the heartbeat's store. A stop, and
    the end of a run, takes a few messages of every rank.
    """

    def __init__(self, ranks: Ranks, signals: StopSignals, heartbeat: Heartbeat) -> None:
        self.ranks, self.signals, self._heartbeat = ranks, signals, heartbeat
        self._lock, self._agreed = Lock(), Event()
        self._calls, self._promised, self._sync_point = 0, NEVER, NEVER

    def __enter__(self) -> "PreemptionSync":
        if self.ranks.world_size > 1:
            # A client of its own: one that waits for a key blocks all threads that use it.
            self._store = self._heartbeat.connect()
            self._store.set_timeout(WAIT)
            self._agreement = Thread(target=self._agree, daemon=True)
            self._agreement.start()
            Thread(target=self._request, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ranks.world_size > 1:
            with self._lock:
                self._calls = NEVER - 1  # others need not wait for this rank's next call
            self._ask()  # ends the threads of all ranks, which wait for it
            self._agreement.join(None if kind is None else GRACE_SECONDS)

    def reached(self) -> bool:
        """Whether all ranks stop here; every rank must call it equally often."""
        if self.ranks.world_size == 1:
            return self.signals.received is not None
        with self._lock:
            self._calls += 1
            if self._calls < self._promised:
                return False
        self._agreed.wait()
        return self._calls == self._sync_point

    def _request(self) -> None:
        self.signals.arrived.wait()
        if self.signals.received is not None:
            self._ask()

    def _ask(self) -> None:
        with suppress(RuntimeError):  # rank 0 has gone, as the heartbeat says
            self._heartbeat.store.set(REQUESTED, "")

    def _agree(self) -> None:
        with suppress(RuntimeError):  # as above
            self._wait_for_request()
            with self._lock:
                self._promised = self._calls + 1
            self._store.set(_promise(self.ranks.rank), str(self._promised))
            if self.ranks.is_main:
                self._store.set(SYNC_POINT, str(max(self._promises())))
            self._sync_point = int(self._store.get(SYNC_POINT))
            self._agreed.set()

    def _promises(self) -> list[int]:
        """The calls that all ranks have promised; ends the run if one does not answer."""
        every = range(self.ranks.world_size)
        seconds = PATIENCE * self._heartbeat.silence
        self._store.set_timeout(timedelta(seconds=seconds))
        try:
            return [int(call) for call in self._store.multi_get([*map(_promise, every)])]
        except DistStoreError:
            silent = (rank for rank in every if not self._store.check([_promise(rank)]))
            self._heartbeat.publish_lost(next(silent), seconds)
            raise

    def _wait_for_request(self) -> None:
        while True:
            try:
                return self._store.wait([REQUESTED])
            except DistStoreError:  # after WAIT
                continue


def _promise(rank: int) -> str:
    """Key of the store: the last call of a rank before it knows the sync point."""
    return f"last call of {rank}"
