"""The first losses of the quickstart are those of every version before: a cheap guard."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

LOSS = (
    *(2.310807, 2.36793, 2.31414, 2.361977),
    *(2.416882, 2.333548, 2.369787, 2.293955),
    *(2.29697, 2.289499, 2.316954, 2.311094),
    *(2.276893, 2.267921, 2.288829, 2.333535),
)
GRAD_NORM = (
    *(2.69849, 2.08818, 1.25697, 1.87833),
    *(2.03194, 1.09895, 1.50105, 0.87953),
    *(1.07733, 1.10652, 1.26574, 1.47864),
    *(0.66737, 1.23502, 0.64593, 1.5097),
)
"""Of commit 03dcdfd and torch 2.12.1, one rank, fp32, without warm-up; torch 2.14.1 gives the same
bits. The tolerance is for other processors, which add in another order."""


def test_the_first_updates_of_the_quickstart(run: Any, digits: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)  # that commit's first values: timm's, of the seed of the run
    size = {"img_size": 24, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    save_file(model.state_dict(), weights)
    done = run(
        *(sys.executable, "launch/train.py", "--config", "launch/configs/quickstart.yaml"),
        *(f"output={tmp_path}", "name=curve", "train.precision=fp32", "train.log_every=1"),
        f"model.weights={weights}",
        *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton"),
        *("optim.warmup_epochs=0", "optim.lr=1e-3", f"train.max_updates={len(LOSS)}"),
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "curve/train.csv").open() as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["loss"]) for row in rows], LOSS, rtol=0, atol=1e-4)
    np.testing.assert_allclose([float(row["grad_norm"]) for row in rows], GRAD_NORM, rtol=1e-3)
