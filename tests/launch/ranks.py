"""Ranks of a run, to be killed at will."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.forks import start

CONFIG = "launch/configs/quickstart.yaml"
Run = tuple[Sequence[str], str] | tuple[Sequence[str], str, str]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """The processes of one run on this machine.

    Args:
        runs: overrides of the quickstart's configuration, or of the YAML that comes third, and
            what to resume from, one after the other.
        spy: called in every rank before training, to change what the trainer does.
    """

    def __init__(
        self,
        folder: Path,
        world_size: int,
        runs: Sequence[Run],
        spy: Callable[[], None] | None = None,
    ) -> None:
        self.log = folder / f"ranks-{time.monotonic_ns()}"
        port = free_port()
        self.processes = [
            start(_train, rank, world_size, port, list(runs), spy, f"{self.log}.{rank}")
            for rank in range(world_size)
        ]

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            pid = self.processes[rank].pid
            if self.processes[rank].is_alive() and pid is not None:
                os.kill(pid, number)

    def kill(self) -> None:
        """End all at once, as a machine that dies does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 600) -> list[int | None]:
        """Their exit codes, None where one has not ended in time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for(self, text: str, seconds: float = 600) -> None:
        """Wait until a rank has written this text."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, self.output()
            assert any(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.02)

    def output(self) -> str:
        """What the ranks have written."""
        logs = sorted(self.log.parent.glob(f"{self.log.name}.*"))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def succeed(self, seconds: float = 600) -> None:
        """Wait for all to end well."""
        codes = self.wait(seconds)
        assert codes == [0] * len(codes), f"{codes}: {self.output()}"


def _train(
    rank: int,
    world_size: int,
    port: int,
    runs: list[Run],
    spy: Callable[[], None] | None,
    log: str,
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    numbers["LOCAL_WORLD_SIZE"] = world_size
    os.environ |= {key: str(value) for key, value in numbers.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    sys.argv = ["launch/train.py"]

    import torch

    # In a forked process two threads that set it first at the same time abort (torch 2.14: the pool
    # that the parent had is replaced without a lock), as autograd's threads do.
    torch.set_num_threads(1)

    from irpe_ds.cli import run
    from irpe_ds.cluster.process_group import destroy_process_group
    from irpe_ds.config import load_config
    from irpe_ds.errors import ExitCode
    from irpe_ds.training.run import train

    def main() -> None:
        if spy is not None:
            spy()
        for overrides, resume, *yaml in runs:
            (path,) = yaml or (CONFIG,)
            if not train(load_config(path, list(overrides)), resume):
                destroy_process_group()
                sys.exit(ExitCode.REQUEUE)
        destroy_process_group()

    run(main)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What a run has logged, but for what depends on the clock and on memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = {"images_per_s", "step_ms", "data_wait", "memory_gib", "tflops"}
    found = [row for row in map(json.loads, lines) if row["kind"] == kind]
    return [{key: row[key] for key in row.keys() - measured} for row in found]
