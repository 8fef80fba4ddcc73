"""Ranks that hear of each other: a host that vanishes without a word ends the run, by name.

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

SILENCE_SECONDS = 40.0
"""How long a rank may be silent; a link that comes back sooner costs only the time."""
BEATS = 10
"""Signs of life in that time."""
VERDICT = "verdict"


class Heartbeat:
    """While entered, every rank tells the first that it is alive, and learns whether all are.

    Where one is silent too long, every rank that is left says which, on which host, and ends with
    code 1. Threads of their own do it, however long a rank computes or waits.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.silence = ranks, SILENCE_SECONDS
        self._over = Event()

    def __enter__(self) -> "Heartbeat":
        ranks = self.ranks
        if ranks.world_size == 1:
            return self
        if ranks.is_main:
            self._store = self._open(0)
        port = ranks.on_rank0(lambda: self._store.port)
        if not ranks.is_main:
            self._store = self._open(port)
        self._store.set(str(ranks.rank), "0")
        ranks.any_rank(False)  # until all have
        self._heard = time.monotonic()
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
        self._over.set()
        if self.ranks.world_size > 1 and kind is None:
            for thread in self._threads:
                thread.join()
            self.ranks.any_rank(False)  # the first one's store goes last

    def _open(self, port: int) -> TCPStore:
        address, patience = os.environ["MASTER_ADDR"], timedelta(seconds=self.silence)
        first = self.ranks.is_main
        return TCPStore(address, port, None, first, timeout=patience, wait_for_workers=False)

    def _beat(self) -> None:
        """Exchange signs of life; blocks where the first rank's host does not answer."""
        number = 0
        others = [str(rank) for rank in range(self.ranks.world_size)]
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        while not self._over.wait(self.silence / BEATS):
            number += 1
            try:
                self._store.set(str(self.ranks.rank), str(number))
                if self._store.check([VERDICT]):
                    self._end(self._store.get(VERDICT).decode())
                beats = self._store.multi_get(others) if self.ranks.is_main else []
            except RuntimeError:  # its end of the connection is closed
                self._over.wait(self.silence / BEATS)  # this rank may be about to leave too
                self._end(f"rank 0 on {self.ranks.hostnames[0]} is gone")
            now = self._heard = time.monotonic()
            for rank, beat in zip(others, beats, strict=False):
                if heard[rank][0] != beat:
                    heard[rank] = beat, now
                elif now - heard[rank][1] > self.silence:
                    self._condemn(int(rank))

    def _watch(self) -> None:
        """End this rank when the first one does not answer."""
        while not self._over.wait(self.silence / BEATS):
            if time.monotonic() - self._heard > self.silence + 3 * self.silence / BEATS:
                self._end(self._verdict(0))

    def _condemn(self, rank: int) -> None:
        self._store.set(VERDICT, self._verdict(rank))
        time.sleep(3 * self.silence / BEATS)  # for the others to read it
        self._end(self._verdict(rank))

    def _verdict(self, rank: int) -> str:
        return (
            f"rank {rank} on {self.ranks.hostnames[rank]} has not answered for {self.silence:g} s"
        )

    def _end(self, verdict: str) -> None:
        if not self._over.is_set():
            own = f"[rank {self.ranks.rank} on {self.ranks.hostnames[self.ranks.rank]}]"
            sys.stderr.write(f"{own} error: {verdict}; --resume auto goes on\n")
            sys.stderr.flush()
            os._exit(1)
