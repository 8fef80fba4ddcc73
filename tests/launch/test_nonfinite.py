"""Updates whose gradients are not finite are skipped, and too many of them end the run."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.launch.outcomes import BATCH, KINDS, PER_EPOCH, UPDATES, losses, slow, tensors, zero
from tests.launch.ranks import Ranks, rows

pytestmark = pytest.mark.dist


def poison(updates: range) -> None:
    """What the second rank sees in some updates is not finite."""
    from irpe_ds.training.trainer import Trainer

    step = Trainer.step

    def poisoned(self: Any, batch: Any, micro_step: int) -> Any:
        inputs = self.inputs

        def not_finite(batch: Any) -> Any:
            images, targets = inputs(batch)
            return images * float("nan"), targets

        if self.update + 1 in updates and self.ranks.rank == 1:
            self.inputs = not_finite
        try:
            return step(self, batch, micro_step)
        finally:
            self.inputs = inputs

    Trainer.step = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), slow(0, "bf16"), slow(1, "fp32"), slow(3, "bf16")]
)
def test_updates_that_are_not_finite_are_left_out(
    stage: int, precision: str, common: list[str], output: Path, tmp_path: Path
) -> None:
    name = f"skips-{stage}-{precision}"
    run = [*common, *zero(stage, precision), f"name={name}", "train.max_skips=3"]
    Ranks(tmp_path, 2, [(run, "never")], partial(poison, range(3, 6))).succeed()
    lines = (output / name / "skipped.jsonl").read_text().splitlines()
    skipped = {row["update"]: row["samples"] for row in map(json.loads, lines)}
    permutation = np.random.default_rng([0, 0]).permutation(1438)
    assert skipped == {u: permutation[(u - 1) * BATCH : u * BATCH].tolist() for u in (3, 4, 5)}
    for kind in KINDS:
        assert all(tensor.isfinite().all() for tensor in tensors(output / name, kind).values())
    assert torch.isfinite(losses(output / name)).all()
    manifest = output / name / f"checkpoints/update-{UPDATES:08d}/checkpoint.json"
    assert json.loads(manifest.read_text())["steps"] == UPDATES - 3


def test_too_many_of_them_end_the_run(common: list[str], output: Path, tmp_path: Path) -> None:
    run = [*common, *zero(1), "name=hopeless", "train.max_skips=4"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], partial(poison, range(18, 100)))
    assert ranks.wait() == [1, 1]
    assert "error: 5 updates in a row, up to 22, had gradients" in ranks.output()
    assert "Traceback" not in ranks.output()
    assert len((output / "hopeless/skipped.jsonl").read_text().splitlines()) == 5
    (checkpoint,) = (output / "hopeless/checkpoints").iterdir()
    assert checkpoint.name == f"update-{PER_EPOCH:08d}"


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(),  # what DeepSpeed 0.19.8 asks on a CPU
    reason="this processor does not compute in fp16",
)
def test_an_overflow_in_fp16_is_the_loss_scales(
    common: list[str], output: Path, tmp_path: Path
) -> None:
    run = [*common, *zero(1, "fp16"), "name=fp16"]
    Ranks(tmp_path, 2, [(run, "never")], partial(poison, range(3, 6))).succeed()
    assert not (output / "fp16/skipped.jsonl").exists()
    scales = [row["loss_scale"] for row in rows(output / "fp16", "train")]
    assert scales[1] / scales[5] == 4  # hysteresis lets the first pass
    assert torch.isfinite(losses(output / "fp16")).all()
