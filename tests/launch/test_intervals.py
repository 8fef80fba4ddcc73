"""Evaluations and checkpoints whenever they are wanted, and BatchNorm's statistics in them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.checkpoint.reader import complete, read_manifest
from tests.launch.outcomes import PER_EPOCH, UPDATES, same_bits, zero
from tests.launch.ranks import Ranks, rows
from tests.launch.test_survival import slow_steps

pytestmark = pytest.mark.dist


def saved(folder: Path) -> dict[int, bool]:
    """Update of each checkpoint, and whether it was evaluated."""
    manifests = map(read_manifest, complete(folder / "checkpoints"))
    return {manifest.update: bool(manifest.scores) for manifest in manifests}


@pytest.mark.parametrize(
    ("every", "save", "expected"),
    [
        ("12", "5", {5: False, 10: False, 12: True, 15: False, 20: False, 24: True, 25: False}),
        ("2 epochs", "null", {2 * PER_EPOCH: True}),
    ],
)
def test_longer_and_shorter_than_an_epoch(
    every: str,
    save: str,
    expected: dict[int, bool],
    common: list[str],
    output: Path,
    tmp_path: Path,
) -> None:
    name = f"every-{every}".replace(" ", "-")
    run = [
        *common,
        *zero(1),
        f"name={name}",
        f"train.eval_every={every}",
        f"train.save_every={save}",
    ]
    run.append("train.keep_checkpoints=20")
    Ranks(tmp_path, 2, [([*run, "train.max_updates=26"], "never"), (run, "auto")]).succeed()
    expected |= {26: True, UPDATES: True}  # the last ones
    assert saved(output / name) == expected
    evaluated = [row["update"] for row in rows(output / name, "eval")]
    assert evaluated == [update for update, scored in sorted(expected.items()) if scored]


@pytest.mark.slow
def test_batchnorm_of_the_checkpoint_is_what_was_scored(
    common: list[str], output: Path, run: Any, tmp_path: Path
) -> None:
    """Ranks see other images; a run that was killed logs the same scores."""
    model = ("model.name=resnet10t", "model.rpe=null", "model.options={}", "model.drop_path=0")
    recipe = [*common, *zero(1), *model, "train.save_every=4"]
    whole, killed = ([*recipe, f"name=norm-{name}"] for name in ("whole", "killed"))
    Ranks(tmp_path, 2, [(whole, "never")]).succeed()
    ranks = Ranks(tmp_path, 2, [(killed, "never")], slow_steps)
    ranks.wait_for("epoch 1: top-1")
    ranks.kill()
    Ranks(tmp_path, 2, [(killed, "auto")]).succeed()
    same_bits(output / "norm-whole", output / "norm-killed")
    *_, last = rows(output / "norm-whole", "eval")
    evaluate = ("launch/evaluate.py", "--run", output / "norm-whole", "--pipeline", "ffcv")
    done = run(sys.executable, *evaluate)
    assert f"top-1 {last['top1']:.2f} %" in done.stdout, done.stderr
    assert f"loss {last['loss']:.4f}" in done.stdout
    assert last["loss"] != pytest.approx(last["ema_loss"])
