"""What ends a run of two ranks: a full disk, a run folder that is deleted, a damaged file."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.launch.outcomes import slow, zero
from tests.launch.ranks import Ranks, rows

pytestmark = pytest.mark.dist


def in_update(number: int, rank: int, act: Callable[[Path], None]) -> None:
    """A rank does something to the run folder before an update."""
    from irpe_ds.training.trainer import Trainer

    update = Trainer.train_update

    def acting(self: Any, *arguments: Any) -> None:
        if (self.update + 1, self.ranks.rank) == (number, rank):
            act(self.config.folder)
        update(self, *arguments)

    Trainer.train_update = acting  # type: ignore[method-assign]


def move(folder: Path) -> None:
    folder.rename(f"{folder}-moved")


def fill_disk(rank: int) -> None:
    """There is no room for what a rank writes of a checkpoint."""
    from irpe_ds.checkpoint import writer

    write = writer.write_shards

    def full(path: Path, *arguments: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *arguments)

    writer.write_shards = full


def truncate_data(rank: int, data: Path) -> None:
    """The training data of a rank, which has begun to read them, are cut short."""
    in_update(3, rank, lambda _: os.truncate(data, 100_000))


HERE = socket.gethostname()
GONE = "the run folder was deleted or moved under the run"
FULL = "cannot write checkpoint: "


@pytest.mark.parametrize(
    ("spy", "said"),
    [
        (partial(in_update, 3, 0, shutil.rmtree), [GONE, f"rank 0 on {HERE} failed: "]),
        slow(partial(in_update, 3, 0, move), [GONE, f"rank 0 on {HERE} failed: "]),
        slow(partial(fill_disk, 1), [f"rank 1 on {HERE}: {FULL}", FULL]),
        slow(partial(fill_disk, 0), [FULL, f"rank 0 on {HERE}: {FULL}"]),
    ],
    ids=["deleted", "moved", "full under rank 1", "full under rank 0"],
)
def test_it_is_said_by_both_ranks(
    spy: Callable[[], None], said: list[str], common: list[str], output: Path, tmp_path: Path
) -> None:
    name = f"storage-{tmp_path.name}"
    run = [*common, *zero(1), f"name={name}", "train.save_every=6"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], spy)
    assert ranks.wait(600) == [2, 2], ranks.output()
    for rank, text in enumerate(said):
        output_of = Path(f"{ranks.log}.{rank}").read_text()
        assert f"[rank {rank}] error: " in output_of
        assert text in output_of
        assert "Traceback" not in output_of
    assert not list((output / name).glob("checkpoints/update-*"))


@pytest.mark.slow
def test_data_that_are_truncated_while_they_are_read(
    common: list[str], digits: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.beton"
    for path in digits.glob("train.beton*"):
        shutil.copy(path, tmp_path)
    run = [*common, *zero(1), f"data.train={data}", "name=truncated", "train.epochs=50"]
    run.append("train.max_updates=600")
    ranks = Ranks(tmp_path, 2, [(run, "never")], partial(truncate_data, 1, data))
    assert ranks.wait(600) == [2, 2], ranks.output()
    assert "to read sample" in ranks.output()
    assert "Traceback" not in ranks.output()


def test_staged_data_give_the_same_run(common: list[str], output: Path, tmp_path: Path) -> None:
    disk, name = tmp_path / "disk", f"staged-{tmp_path.name}"
    run = [*common, *zero(1), "train.max_updates=4"]
    copied = [*run, f"name={name}", f"data.stage={disk}"]
    ranks = Ranks(tmp_path, 2, [([*run, f"name=not-{name}"], "never"), (copied, "never")])
    ranks.succeed()
    assert f"training images are read from {disk}/train-" in ranks.output()
    assert len(list(disk.glob("*/*.beton"))) == 2
    assert rows(output / name, "train") == rows(output / f"not-{name}", "train")
    assert str(disk) not in re.sub("stage: .*", "", (output / name / "config.yaml").read_text())
