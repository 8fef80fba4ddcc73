"""Ranks report that they are alive; one whose host hangs or disappears ends the run, by name.

A process that dies closes its connections, which ends the others at once. A host that loses power,
hangs or drops off the network does not: the others would wait for it until a collective times out,
half an hour or more.
"""

import os
import sys
import time
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType

from torch.distributed import TCPStore

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.errors import ExitCode

SILENCE_SECONDS = 40.0
"""How long a rank may be silent; a link that recovers sooner only costs the time it was down."""
BEATS = 10
"""Heartbeats sent in that time."""
FAILURE = "failure"
"""Key of the store under which rank 0 publishes which rank was lost."""


class Heartbeat:
    """While entered, every rank reports to rank 0 that it is alive, and learns whether all are.

    When a rank is silent too long, the remaining ranks print which one, on which host, and exit
    with `ExitCode.FAILED`. Background threads do this, however long a rank computes or waits.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.silence = ranks, SILENCE_SECONDS
        self._stopping = Event()

    def __enter__(self) -> "Heartbeat":
        ranks = self.ranks
        if ranks.world_size == 1:
            return self
        if ranks.is_main:
            self.store = self._connect(0, is_server=True)
        self._port = ranks.on_rank0(lambda: self.store.port)
        if not ranks.is_main:
            self.store = self.connect()
        self.store.set(str(ranks.rank), "0")
        ranks.any_rank(False)  # a barrier: every rank has set its key
        self._last_contact = time.monotonic()
        self._threads = [Thread(target=self._beat, daemon=True)]
        self._threads.append(Thread(target=self._watch, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        distributed = self.ranks.world_size > 1
        if distributed and kind is not None and self._seconds_of_silence() > self.silence:
            self._abort(self._lost(0))  # the error is that another rank has already ended over it
        self._stopping.set()
        if distributed and kind is None:
            for thread in self._threads:
                thread.join()
            self.ranks.any_rank(False)  # a barrier: rank 0 serves the store until all are done

    def connect(self) -> TCPStore:
        """Another client of the store."""
        return self._connect(self._port, is_server=False)

    def _connect(self, port: int, is_server: bool) -> TCPStore:
        address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=self.silence)
        return TCPStore(address, port, None, is_server, timeout=timeout, wait_for_workers=False)

    def _beat(self) -> None:
        """Exchange heartbeats; blocks while the host of rank 0 does not answer."""
        count = 0
        others = [str(rank) for rank in range(self.ranks.world_size)]
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        while not self._stopping.wait(self.silence / BEATS):
            count += 1
            try:
                self.store.set(str(self.ranks.rank), str(count))
                if self.store.check([FAILURE]):
                    self._abort(self.store.get(FAILURE).decode())
                beats = self.store.multi_get(others) if self.ranks.is_main else []
            except RuntimeError:  # rank 0 closed the connection
                self._stopping.wait(self.silence / BEATS)  # this rank may be about to finish too
                self._abort(f"rank 0 on {self.ranks.hostnames[0]} is gone")
            now = self._last_contact = time.monotonic()
            for rank, beat in zip(others, beats, strict=False):
                if heard[rank][0] != beat:
                    heard[rank] = beat, now
                elif now - heard[rank][1] > self.silence:
                    self.publish_lost(int(rank))

    def _watch(self) -> None:
        """End this rank when rank 0 does not answer."""
        while not self._stopping.wait(self.silence / BEATS):
            if self._seconds_of_silence() > self.silence + 3 * self.silence / BEATS:
                self._abort(self._lost(0))

    def _seconds_of_silence(self) -> float:
        """For how long rank 0 has not answered."""
        return time.monotonic() - self._last_contact

    def publish_lost(self, rank: int) -> None:
        """End all ranks, naming one that does not answer; rank 0 calls it."""
        self.store.set(FAILURE, self._lost(rank))
        time.sleep(3 * self.silence / BEATS)  # for the others to read it
        self._abort(self._lost(rank))

    def _lost(self, rank: int) -> str:
        host = self.ranks.hostnames[rank]
        return f"rank {rank} on {host} has not answered for {self.silence:g} s"

    def _abort(self, reason: str) -> None:
        if not self._stopping.is_set():
            own = f"[rank {self.ranks.rank} on {self.ranks.hostnames[self.ranks.rank]}]"
            sys.stderr.write(f"{own} error: {reason}; rerun with --resume auto to continue\n")
            sys.stderr.flush()
            os._exit(ExitCode.FAILED)  # sys.exit would end this thread alone
