"""Relative position is learned: with it the offset between two marks is seen, without it not."""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.offsets import OFFSETS
from irpe_ds.config import load_config
from irpe_ds.models.build import build_model
from irpe_ds.models.offset_maps import offset_maps
from irpe_ds.plots.tables import validation_images
from tests.launch.outcomes import tensors
from tests.launch.ranks import Ranks, rows

pytestmark = [pytest.mark.dist, pytest.mark.slow]
CHANCE = 100 / 8
UPDATES = 744  # 12 epochs; "k" is at 98 % after 9, and at 100 % from the 10th on
CONFIG = "launch/configs/offsets.yaml"


@pytest.fixture(scope="module")
def runs(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders `k` and `plain`, trained side by side on a core each."""
    folder = tmp_path_factory.mktemp("offsets")
    made = run(sys.executable, "data_prep/offsets.py", "--out", folder / "data")
    assert made.returncode == 0, made.stderr
    for part in ("train", "val"):
        convert = ("data_prep/convert.py", "--source", folder / "data" / part, "--out")
        made = run(sys.executable, *convert, folder / f"{part}.beton")
        assert made.returncode == 0, made.stderr

    common = [
        *(f"output={folder}", f"train.max_updates={UPDATES}", "data.workers=1"),
        *(f"data.train={folder}/train.beton", f"data.val={folder}/val.beton"),
    ]
    trainings = {"k": [], "plain": ["model.rpe=null"]}
    both = [
        Ranks(folder, 1, [([*common, f"name={name}", *own], "never", CONFIG)])
        for name, own in trainings.items()
    ]
    for training in both:
        training.succeed(1800)
    return folder


def top1(folder: Path) -> float:
    return rows(folder, "eval")[-1]["top1"]


def test_plain_vit_stays_near_chance_and_rpe_on_keys_does_not(runs: Path) -> None:
    assert top1(runs / "k") >= 95
    assert top1(runs / "plain") <= CHANCE + 5


def test_the_tables_show_it(runs: Path) -> None:
    """No two of the eight offsets look alike in the maps; before training all do."""
    config = load_config(runs / "k/config.yaml")
    model = build_model(config.model).eval()
    model.load_state_dict(tensors(runs / "k", "weights", UPDATES))
    maps = torch.cat(offset_maps(model, "k", lambda: validation_images(config, 64)))
    logits = torch.stack([maps[:, 4 + row, 4 + col] for row, col in OFFSETS.values()])
    for one, other in combinations(logits, 2):
        assert (one - other).abs().max() > 0.1
