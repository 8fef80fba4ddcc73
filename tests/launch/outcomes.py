"""Small runs of the quickstart, and what they leave behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from irpe_ds.checkpoint.reader import open_files
from tests.launch.ranks import rows

KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
UPDATES, PER_EPOCH, BATCH = 30, 14, 96


def slow(*values: Any) -> Any:
    """A case that `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def zero(stage: int, precision: str = "fp32", accumulation: int = 1) -> list[str]:
    return [
        f"train.deepspeed=ds_configs/zero{stage}.json",
        *(f"train.precision={precision}", f"train.accumulation={accumulation}"),
    ]


EPS = "optim.eps=1e-4"
"""Of AdamW where sums in another order are compared: it would make 1e-3 of a gradient that is zero
but for rounding, such as that of the keys' bias, which softmax does not see."""


def tensors(folder: Path, kind: str, updates: int = UPDATES) -> dict[str, torch.Tensor]:
    """The tensors of one kind in a run's checkpoint, by name."""
    return saved(folder / f"checkpoints/update-{updates:08d}", kind)


def saved(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one kind in a checkpoint, by name."""
    files = open_files(path)
    keys = [key for key in files.shapes if key.startswith(f"{kind}.")]
    return {key.removeprefix(f"{kind}."): files.whole(key) for key in keys}


def losses(folder: Path, updates: int = UPDATES) -> torch.Tensor:
    found = [row["loss"] for row in rows(folder, "train")]
    assert len(found) == updates
    return torch.tensor(found, dtype=torch.float64)


def same_bits(one: Path, other: Path) -> None:
    """Compare all that two runs have left."""
    for kind in ("train", "eval"):
        assert rows(one, kind) == rows(other, kind)
    for kind in KINDS:
        expected, got = tensors(one, kind), tensors(other, kind)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected), kind
