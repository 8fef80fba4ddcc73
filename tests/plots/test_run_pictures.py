"""What W&B and TensorBoard get of a run, and that none of it ends one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from irpe_ds.config import RunConfig
from irpe_ds.data.loaders import Batch
from irpe_ds.plots import run_pictures, tables

CHECKPOINT = Path(__file__).parents[1] / "checkpoint/format2/update-00000005"
Sent = list[tuple[str, tuple[Any, ...]]]


class Log:
    """Remembers what it is sent and told."""

    def __init__(self, *, has_sinks: bool = True) -> None:
        self.has_sinks, self.sent, self.notes = has_sinks, Sent(), list[str]()

    def send(self, job: Callable[[Any], None]) -> None:
        class Sink:
            def __getattr__(sink, name: str) -> Callable[..., None]:
                return lambda *arguments: self.sent.append((name, arguments))

        job(Sink())

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def names(self) -> list[Any]:
        return [(kind, *arguments[:2]) for kind, arguments in self.sent]


class FakeTrainer:
    """Trains four epochs of five updates in no time, each followed by an evaluation."""

    def __init__(self, tmp_path: Path, *, is_main: bool = True, finishes: bool = True, **log: Any):
        self.config = RunConfig.model_validate(
            {
                "name": "x",
                "output": tmp_path,
                "model": {"name": "deit", "num_classes": 3, "img_size": 4, "rpe": {"on": "kv"}},
                "data": {"train": "a.beton", "val": "b.beton"},
                "log": log,
            }
        )
        self.ranks: Any = SimpleNamespace(
            rank=0, is_main=is_main, device=torch.device("cpu"), on_rank0=lambda f: f()
        )
        self.length: Any = SimpleNamespace(updates_per_epoch=5, last_update=20)
        self.update, self.finishes = 0, finishes
        self.confusion: Tensor | None = None
        self.on_scored: Callable[[Path], None] = lambda checkpoint: None
        self.train_batches: Any = SimpleNamespace(epoch=self.epoch)

    def epoch(self, epoch: int, first_pass: int, img_size: tuple[int, int]) -> Any:
        assert (epoch, first_pass, img_size) == (0, 0, (4, 4))
        yield Batch(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.arange(8) % 3, None)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images.float(), batch.labels

    def fit(self, log: Log) -> bool:
        for self.update in (5, 10, 15, 20):
            self.on_scored(CHECKPOINT)
        if self.confusion is not None:
            self.confusion += torch.eye(3)
        return self.finishes


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ("ant", "bee", "cat")
    monkeypatch.setattr(run_pictures, "dataset_info", lambda *_: SimpleNamespace(classes=classes))
    maps = {0: np.ones((1, 5, 5))}
    monkeypatch.setattr(tables, "read_maps", lambda config, weights, on, *_: (on, maps, None))


def test_everything_at_its_update(tmp_path: Path) -> None:
    log, wandb = Log(), {"artifacts": "all"}
    trainer = FakeTrainer(tmp_path, images=4, tables_every=2, confusion=True, wandb=wandb)
    assert run_pictures.fit(trainer, log)  # type: ignore[arg-type]
    assert log.notes == []
    saved = ("checkpoint", CHECKPOINT, 5)
    assert log.names == [
        ("picture", "inputs", 0),
        saved,
        *[("picture", "tables/k", 10), ("picture", "tables/v", 10), saved],
        saved,
        *[("picture", "tables/k", 20), ("picture", "tables/v", 20), saved],
        *[("picture", "confusion", 20), ("table", "classes", 20)],
    ]
    assert all(picture[2].dtype == np.uint8 for kind, picture in log.sent if kind == "picture")
    assert [row["class"] for row in log.sent[-1][1][2]] == ["ant", "bee", "cat"]


def test_the_best_checkpoint_of_a_run_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_pictures.reader, "complete", lambda folder: [CHECKPOINT])
    wandb = {"artifacts": "best"}
    for finishes in (True, False):
        log, trainer = Log(), FakeTrainer(tmp_path, finishes=finishes, images=0, wandb=wandb)
        run_pictures.fit(trainer, log)  # type: ignore[arg-type]
        assert log.names == [("checkpoint", CHECKPOINT, 5)] * finishes
        if finishes:
            assert log.sent[0][1][3] == ["update-5", "best"]


@pytest.mark.parametrize(("is_main", "has_sinks"), [(False, True), (True, False)])
def test_nothing_is_drawn_where_nobody_looks(
    is_main: bool, has_sinks: bool, tmp_path: Path
) -> None:
    log = Log(has_sinks=has_sinks)
    trainer = FakeTrainer(tmp_path, is_main=is_main, tables_every=1, confusion=True)
    run_pictures.fit(trainer, log)  # type: ignore[arg-type]
    assert log.sent == []
    assert (trainer.confusion is not None) == has_sinks  # all ranks count


def test_what_fails_is_a_line_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr(run_pictures, "dataset_info", fail)
    monkeypatch.setattr(tables, "read_maps", fail)
    log, trainer = Log(), FakeTrainer(tmp_path, tables_every=4, confusion=True)
    assert run_pictures.fit(trainer, log)  # type: ignore[arg-type]
    assert log.notes == [
        f"no {what}: ImportError: no matplotlib"
        for what in ("picture of the inputs", "picture of the tables", "confusion matrix")
    ]
