"""All ranks stop after the same update, without a collective."""

import json
import os
import pty
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.forks import ENVIRONMENT
from tests.launch.outcomes import PER_EPOCH, UPDATES, slow, zero
from tests.launch.ranks import CONFIG, Ranks, free_port

pytestmark = pytest.mark.dist


def signal_itself(at: int | str, receivers: list[int]) -> None:
    """Some ranks receive a signal in an update, or in an evaluation; a stop needs no collective."""
    import torch.distributed as dist

    from irpe_ds.cluster.preemption import NEVER, PreemptionSync
    from irpe_ds.training import trainer
    from irpe_ds.training.trainer import Trainer

    update, evaluate, reached = Trainer.train_update, trainer.evaluate, PreemptionSync.reached
    current: list[Any] = []

    def send(place: int | str) -> None:
        (self,) = current
        if place == at and self.ranks.rank in receivers:
            os.kill(os.getpid(), signal.SIGTERM)
        while place == at and self.preemption._promised == NEVER:
            time.sleep(0.01)  # the update takes longer than the news of the signal

    def signalled(self: Any, *arguments: Any) -> None:
        current[:] = [self]
        send(self.update + 1)
        update(self, *arguments)

    def evaluating(model: Any, batches: Any, *arguments: Any) -> Any:
        def seen() -> Any:
            for batch in batches:
                yield batch
                send("evaluation")

        return evaluate(model, seen(), *arguments)

    def alone(self: Any) -> bool:
        collectives = [name for name in vars(dist) if name.startswith(("all_", "broad", "barr"))]
        forbidden = mock.Mock(side_effect=AssertionError("a collective"))
        with mock.patch.multiple(dist, **dict.fromkeys(collectives, forbidden)):
            return reached(self)

    Trainer.train_update, trainer.evaluate = signalled, evaluating  # type: ignore[method-assign]
    PreemptionSync.reached = alone  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("at", "receivers", "last"),
    [
        (5, [3], 5),
        slow(1, [0], 1),
        slow(UPDATES, [1, 2], UPDATES),
        slow("evaluation", [1], PER_EPOCH),
    ],
)
def test_all_stop_after_the_update_with_the_signal(
    at: int | str, receivers: list[int], last: int, common: list[str], output: Path, tmp_path: Path
) -> None:
    run = [*common, *zero(1), f"name=at-{at}"]
    ranks = Ranks(tmp_path, 4, [(run, "never")], partial(signal_itself, at, receivers))
    assert ranks.wait() == [75] * 4, ranks.output()
    newest = max((output / f"at-{at}/checkpoints").iterdir())
    assert newest.name == f"update-{last:08d}"
    assert json.loads((newest / "checkpoint.json").read_text())["scores"] == {}


@pytest.mark.slow
def test_a_terminal_that_closes_lets_the_ranks_save(common: list[str], output: Path) -> None:
    """It ends the deepspeed command, and with that everything in the foreground gets SIGHUP."""
    long = ("train.epochs=2000", "train.max_updates=20000", "train.save_every=20000")
    options = ("--num_accelerators", "2", "--master_port", str(free_port()))
    command = ["deepspeed", *options, "launch/train.py", "--config", CONFIG]
    command += [*common, *long, "name=closed"]
    folder = output / "closed"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execvpe(command[0], command, os.environ | ENVIRONMENT | {"PATH": path})
    end = time.monotonic() + 600
    while not (folder / "train.csv").exists():
        assert time.monotonic() < end
        os.read(terminal, 1 << 16)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGHUP
    while "stopped by SIGHUP after update" not in (folder / "log.txt").read_text():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert list(folder.glob("checkpoints/update-*"))
