"""Ranks report that they are alive, and why they end; the one that ends a run is named on all.

A process that dies closes its connections, which breaks the others' collectives. A host that loses
power, hangs or drops off the network does not: the others would wait for it until a collective
times out, half an hour or more.
"""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from threading import Event, Lock, Thread
from types import TracebackType

from torch.distributed import TCPStore

from irpe_ds.cluster.process_group import Ranks, is_broken_connection
from irpe_ds.cluster.rendezvous import name_ranks
from irpe_ds.errors import ClusterError, ExitCode, TrainingError, UserError

SILENCE_SECONDS = 40.0
"""How long a rank may be silent; a link that recovers sooner only costs the time it was down."""
BEATS = 10
"""Heartbeats sent in that time."""
ENDING_BEATS = 5
"""For how many heartbeats a rank may finish what it is writing once another has failed."""
LOST, FAILED, READ = "lost", "failed", "read"
"""Keys of the store: a rank that does not answer, published by rank 0, which ends all at once; the
first error of a rank, with its exit code; and how many ranks have read that."""
RERUN = "rerun with --resume auto to continue"


class Heartbeat:
    """While entered, every rank reports to rank 0 that it is alive, and learns whether all are.

    When a rank is silent too long, the remaining ranks print which one, on which host, and exit
    with `ExitCode.FAILED`. Background threads do this, however long a rank computes or waits.

    When a rank ends with an error, or dies, the others' collectives break: what they raise then is
    replaced by an error that names that rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.silence = ranks, SILENCE_SECONDS
        self._stopping, self._reading = Event(), Lock()
        self._failure: ClusterError | TrainingError | None = None
        """What this rank raises, once another has failed."""
        self._absent = 0

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
        if self.ranks.world_size == 1:
            return
        error = error or self._leave_together()
        failure = None
        if error is not None:
            failure = self._why_broken() if is_broken_connection(error) else None
            if failure is None:
                text = f"{self._name(self.ranks.rank)} failed: {_summary(error)}"
                self._publish(text, _exit_code(error))
            self._serve()
        self._stopping.set()
        if failure is not None:
            raise failure from None

    def _leave_together(self) -> RuntimeError | None:
        """Wait for all ranks to be done with the store, which rank 0 serves; the error if one died.

        Each reports that it is alive until the last one is here: rank 0 may still upload its log.
        """
        try:
            self.ranks.any_rank(False)
            self._stopping.set()
            for thread in self._threads:
                thread.join()
            self.ranks.any_rank(False)
        except RuntimeError as error:
            return error
        return None

    def connect(self) -> TCPStore:
        """Another client of the store."""
        return self._connect(self._port, is_server=False)

    def _connect(self, port: int, is_server: bool) -> TCPStore:
        address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=self.silence)
        return TCPStore(address, port, None, is_server, timeout=timeout, wait_for_workers=False)

    def _beat(self) -> None:
        """Exchange heartbeats; blocks while the host of rank 0 does not answer."""
        count, beats_since_failure = 0, 0
        keys = self._keys()
        heard = dict.fromkeys(keys, (b"", time.monotonic()))
        while not self._stopping.wait(self.silence / BEATS):
            count += 1
            try:
                self.store.set(str(self.ranks.rank), str(count))
                if self.store.check([LOST]):
                    self._abort(self.store.get(LOST).decode())
                failure = self._read_failure()
                beats = self.store.multi_get(keys) if self.ranks.is_main else []
            except RuntimeError:  # rank 0 closed the connection
                self._stopping.wait(3 * self.silence / BEATS)  # this rank may be ending too
                self._abort(str(self._failure or self._gone([0])))
                return  # it was ending
            now = self._last_contact = time.monotonic()
            if failure is not None:  # over NCCL a collective may wait for ever
                beats_since_failure += 1
                if beats_since_failure > ENDING_BEATS:
                    self._abort(str(failure), _exit_code(failure))
            for rank, beat in zip(keys, beats, strict=False):
                if heard[rank][0] != beat:
                    heard[rank] = beat, now
                elif now - heard[rank][1] > self.silence:
                    self.publish_lost(int(rank), self.silence)

    def _watch(self) -> None:
        """End this rank when rank 0 does not answer."""
        while not self._stopping.wait(self.silence / BEATS):
            if self._seconds_of_silence() > self.silence + 3 * self.silence / BEATS:
                self._abort(self._lost(0, self.silence))

    def _seconds_of_silence(self) -> float:
        """For how long rank 0 has not answered."""
        return time.monotonic() - self._last_contact

    def publish_lost(self, rank: int, seconds: float) -> None:
        """End all ranks, naming one that has not answered for so long; rank 0 calls it."""
        self.store.set(LOST, self._lost(rank, seconds))
        self._say(self._lost(rank, seconds))  # a launcher may not wait for this rank any longer
        time.sleep(3 * self.silence / BEATS)  # for the others to read it
        os._exit(ExitCode.FAILED)

    def _keys(self) -> list[str]:
        """Keys of the heartbeats, by rank."""
        return [str(rank) for rank in range(self.ranks.world_size)]

    def _publish(self, text: str, code: ExitCode, absent: int = 0) -> None:
        """Tell all ranks what ends the run, unless one has done so before.

        Args:
            absent: how many ranks will not hear it.
        """
        with suppress(RuntimeError):  # rank 0 has gone
            self.store.compare_set(FAILED, "", json.dumps([text, code, absent]))
            self._read_failure()

    def _read_failure(self) -> ClusterError | TrainingError | None:
        """What this rank raises because another has failed, if one has."""
        with self._reading:
            if self._failure is None and self.store.check([FAILED]):
                text, code, self._absent = json.loads(self.store.get(FAILED))
                self._failure = (ClusterError if code == ExitCode.MISTAKE else TrainingError)(text)
                self.store.add(READ, 1)
            return self._failure

    def _serve(self) -> None:
        """On rank 0, wait for the others to read what has been published."""
        end = time.monotonic() + 3 * self.silence / BEATS
        while self.ranks.is_main and time.monotonic() < end:
            if self.store.add(READ, 0) >= self.ranks.world_size - self._absent:
                return
            time.sleep(0.05)

    def _why_broken(self) -> ClusterError | TrainingError | None:
        """The failure of another rank that broke a connection; None if all are well."""
        if self._seconds_of_silence() > self.silence:
            self._abort(self._lost(0, self.silence))  # another rank has already ended over it
        others = [key for key in self._keys() if key != str(self.ranks.rank)]
        try:
            before = self.store.multi_get(others)
            end = time.monotonic() + 2.5 * self.silence / BEATS
            while time.monotonic() < end:
                if self._read_failure():
                    return self._failure
                time.sleep(0.05)
            after = self.store.multi_get(others)
        except RuntimeError:  # rank 0 closed the connection
            return self._failure or TrainingError(self._gone([0]))
        gone = [int(key) for key, a, b in zip(others, before, after, strict=True) if a == b]
        if gone:
            self._publish(self._gone(gone), ExitCode.FAILED, absent=len(gone))
        return self._failure

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.ranks.hostnames[rank]}"

    def _lost(self, rank: int, seconds: float) -> str:
        return f"{self._name(rank)} has not answered for {seconds:g} s; {RERUN}"

    def _gone(self, ranks: list[int]) -> str:
        verb = "is" if len(ranks) == 1 else "are"
        return f"{name_ranks(ranks, self.ranks.hostnames)} {verb} gone, killed or crashed; {RERUN}"

    def _abort(self, reason: str, code: int = ExitCode.FAILED) -> None:
        if not self._stopping.is_set():
            self._say(reason)
            os._exit(code)  # sys.exit would end this thread alone

    def _say(self, reason: str) -> None:
        sys.stderr.write(f"[{self._name(self.ranks.rank)}] error: {reason}\n")
        sys.stderr.flush()


def _exit_code(error: BaseException) -> ExitCode:
    return ExitCode.MISTAKE if isinstance(error, UserError) else ExitCode.FAILED


def _summary(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, UserError | TrainingError):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
