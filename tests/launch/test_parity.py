"""ZeRO stages, ranks, accumulation and precisions train the same model."""

import functools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irpe_ds.data.order import train_order
from irpe_ds.data.rng import image_keys
from tests.launch.outcomes import BATCH, EPS, PER_EPOCH, slow, zero
from tests.launch.outcomes import losses as losses_of
from tests.launch.outcomes import tensors as tensors_of
from tests.launch.ranks import Ranks, rows

pytestmark = pytest.mark.dist
UPDATES = 18  # an epoch and a part of the next
losses, tensors = partial(losses_of, updates=UPDATES), partial(tensors_of, updates=UPDATES)
CASES = [(stage, steps, ranks) for ranks in (1, 2, 4) for stage in range(4) for steps in (1, 4)]
FAST = [(0, 1, 1), (1, 1, 2), (3, 1, 2), (1, 4, 2)]  # test_train has every stage on two ranks
Parity = Callable[[int, int, int], Path]


@pytest.fixture(scope="module")
def parity(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """The run of a stage, accumulation and number of ranks; the global batch is always the same."""
    logs, output = tmp_path_factory.mktemp("parity"), Path(common[0].removeprefix("output="))

    base = [*common, EPS, f"train.max_updates={UPDATES}"]

    @functools.cache
    def make(cases: tuple[tuple[int, int, int], ...]) -> None:
        """In the same processes one after the other, to start them only once."""
        runs = [
            ([*base, *zero(stage, accumulation=steps), f"name={stage}-{steps}-{n}"], "never")
            for stage, steps, n in cases
        ]
        Ranks(logs, cases[0][2], runs).succeed(1800)

    def run(*case: int) -> Path:
        ranks, is_fast = case[2], case in FAST
        make(tuple(other for other in CASES if other[2] == ranks and (other in FAST) == is_fast))
        return output / "-".join(map(str, case))

    return run


@pytest.mark.parametrize(
    ("stage", "accumulation", "ranks"),
    [case if case in FAST else slow(*case) for case in CASES],
)
def test_stages_ranks_and_accumulation_agree(
    parity: Parity, stage: int, accumulation: int, ranks: int
) -> None:
    reference, run = parity(0, 1, 1), parity(stage, accumulation, ranks)
    torch.testing.assert_close(losses(run), losses(reference), rtol=0, atol=1e-4)
    expected = tensors(reference, "ema")
    for name, average in tensors(run, "ema").items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-6, msg=name)


def test_the_average_is_one(parity: Parity) -> None:
    """It lies between the first weights and the last, and is neither."""
    run = parity(3, 1, 2)
    weights, average = tensors(run, "weights"), tensors(run, "ema")
    assert average.keys() == weights.keys()
    assert not torch.equal(weights["head.weight"], average["head.weight"])
    scores = rows(run, "eval")[-1]
    assert scores["ema_loss"] != scores["loss"]


@pytest.mark.slow
def test_a_copy_of_the_weights_in_every_node_changes_nothing(
    common: list[str], output: Path, tmp_path: Path
) -> None:
    """Two nodes of two ranks; the copies would be stale if an update or an exchange left them."""
    ds_config = json.loads(Path("ds_configs/zero3_hpz.json").read_text())
    section = ds_config["zero_optimization"]
    section["stage3_param_persistence_threshold"] = 0
    runs = []
    for name, size in (("whole", 1), ("copied", 2)):
        section["zero_hpz_partition_size"] = size
        (tmp_path / f"{name}.json").write_text(json.dumps(ds_config))
        own = [f"name=hpz-{name}", f"train.deepspeed={tmp_path}/{name}.json"]
        steps = ["train.max_updates=4", "train.eval_every=2", "train.precision=fp32"]
        runs.append(([*common, *own, *steps, "train.accumulation=2"], "never"))
    Ranks(tmp_path, 4, runs).succeed()
    whole, copied = output / "hpz-whole", output / "hpz-copied"
    assert rows(copied, "train") == rows(whole, "train")
    assert rows(copied, "eval") == rows(whole, "eval")


def note_keys(folder: Path) -> None:
    """Write down which images every rank trains on, by their keys."""
    from irpe_ds.training.trainer import Trainer

    step = Trainer.step

    def noting(self: Any, batch: Any, micro_step: int) -> Any:
        with (folder / f"{os.getpid()}.keys").open("a") as file:
            file.write(json.dumps([self.update, batch.keys.tolist()]) + "\n")
        return step(self, batch, micro_step)

    Trainer.step = noting  # type: ignore[method-assign]


@pytest.mark.parametrize("last", [2, slow(4)])
def test_ranks_and_stages_change_on_the_way(
    last: int, common: list[str], output: Path, parity: Parity, tmp_path: Path
) -> None:
    folder = output / f"changing-{last}"
    for ranks, stage, updates in ((2, 1, 5), (1, 3, 15), (last, 0, UPDATES)):
        run = [*common, EPS, *zero(stage), f"name={folder.name}", f"train.max_updates={updates}"]
        resume = "never" if updates == 5 else "auto"
        Ranks(tmp_path, ranks, [(run, resume)], partial(note_keys, tmp_path)).succeed()
    assert "with ranks: 2 -> 1; ZeRO stage: 1 -> 3" in (folder / "log.txt").read_text()
    torch.testing.assert_close(losses(folder), losses(parity(1, 1, 2)), rtol=0, atol=1e-3)
    lines = "".join(path.read_text() for path in tmp_path.glob("*.keys")).splitlines()
    seen = sorted((update, key) for update, keys in map(json.loads, lines) for key in keys)
    expected = []
    for update in range(UPDATES):
        epoch, done = divmod(update, PER_EPOCH)
        order = {"batch_size": BATCH, "accumulation": 1, "rank": 0, "world_size": 1}
        samples, repeats, _ = train_order(1438, **order, seed=0, epoch=epoch)
        keys = image_keys(samples, seed=0, epoch=epoch, repeats=repeats)
        assert len(np.unique(samples)) == PER_EPOCH * BATCH
        expected += [(update, int(key)) for key in keys[done * BATCH : (done + 1) * BATCH]]
    assert seen == sorted(expected)


@pytest.mark.slow
def test_precision_changes_on_the_way(
    common: list[str], output: Path, parity: Parity, tmp_path: Path
) -> None:
    precisions = ("fp32", "bf16", "autocast", "fp32")
    runs = [
        ([*common, EPS, *zero(2, precision), "name=mixed", f"train.max_updates={updates}"], resume)
        for precision, updates, resume in zip(
            precisions, (5, 10, 15, UPDATES), ("never", "auto", "auto", "auto"), strict=True
        )
    ]
    Ranks(tmp_path, 2, runs).succeed()
    torch.testing.assert_close(losses(output / "mixed"), losses(parity(2, 1, 2)), rtol=0, atol=1e-3)
