"""What the profiler attributes to which phase, and that it leaves nothing wrapped."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.comm import comm

from irpe_ds.benchmark.step_profiler import COLLECTIVES, StepProfiler


class Work:
    def wait(self) -> None:
        time.sleep(0.02)


class Backend:
    """Collectives that take 20 ms; a reduce-scatter is made of an all-reduce."""

    def all_reduce(self, tensor: torch.Tensor, async_op: bool = False) -> Work:
        return Work()

    def reduce_scatter(self, output: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        self.all_reduce(torch.cat(inputs)).wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(Work(), name, lambda *_: None)


class Engine:
    def backward(self, loss: torch.Tensor) -> None:
        comm.cdb.all_reduce(torch.zeros(100), async_op=True)
        time.sleep(0.05)

    def step(self) -> None:
        comm.cdb.reduce_scatter(torch.zeros(5), [torch.zeros(5), torch.zeros(5)])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(comm, "cdb", Backend())
    ranks = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    meter = SimpleNamespace(wait=lambda batches: time.sleep(0.03))
    return SimpleNamespace(engine=Engine(), meter=meter, ranks=ranks)


def test_seconds_and_bytes_by_phase(trainer: Any) -> None:
    wait = trainer.meter.wait
    with StepProfiler(trainer) as profiler:
        trainer.meter.wait(iter(()))
        trainer.engine.backward(torch.zeros(()))
        trainer.engine.step()
    assert profiler.bytes == {"all_reduce": 400, "reduce_scatter": 40}
    least = {"data": 0.03, "backward": 0.05, "communication": 0.04}
    assert all(profiler.seconds[phase] >= seconds for phase, seconds in least.items())
    assert profiler.seconds.keys() == {*least, "forward", "optimizer"}
    assert not vars(trainer.engine)
    assert trainer.meter.wait is wait
    assert not set(COLLECTIVES) & vars(comm.cdb).keys()


def test_a_single_rank_sends_nothing(trainer: Any) -> None:
    trainer.ranks.world_size = 1
    with StepProfiler(trainer) as profiler:
        trainer.engine.step()
    assert not profiler.bytes
    assert profiler.seconds["communication"] >= 0.02


def test_methods_are_restored_after_an_error(trainer: Any) -> None:
    trainer.engine.lr = None
    with pytest.raises(TypeError), StepProfiler(trainer):
        trainer.engine.step(no_such_argument=1)
    assert vars(trainer.engine) == {"lr": None}
    assert not vars(comm.cdb)
