"""Keeping AdamW's state, or the weights too, in the host's memory changes nothing but the place.

The first run on a machine compiles DeepSpeed's AdamW for the CPU, which takes minutes.
"""

from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import _get_build_directory

from tests.launch.outcomes import KINDS, tensors
from tests.launch.ranks import Ranks, rows

pytestmark = [pytest.mark.dist, pytest.mark.slow]
UPDATES = 6
OFFLOADED = ("zero1_offload", "zero2_offload", "zero3_offload")


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under each of them and under zero1, by name."""
    output = tmp_path_factory.mktemp("offload")
    (Path(_get_build_directory("cpu_adam", False)) / "lock").touch()  # as a killed build leaves it
    common = [
        *(f"output={output}", f"train.max_updates={UPDATES}", "train.log_every=1"),
        *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton", "data.workers=1"),
        *("train.precision=fp32", "train.ema_decay=0.9", "train.global_batch=96"),
        *("model.options.depth=2", "optim.layer_decay=0.5", "optim.clip_grad=0.5"),
    ]
    trainings = [
        ([*common, f"name={name}", f"train.deepspeed=ds_configs/{name}.json"], "never")
        for name in ("zero1", *OFFLOADED)
    ]
    Ranks(output, 2, trainings).succeed(900)
    return output


@pytest.mark.parametrize("name", OFFLOADED)
def test_it_trains_as_without(name: str, runs: Path) -> None:
    expected, got = (rows(runs / x, "train") for x in ("zero1", name))
    assert len(got) == UPDATES
    for one, other in zip(expected, got, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
    # A weight moves by 1e-3 in all; where its gradient is nearly zero, rounding decides which way.
    for kind in KINDS:
        tolerance = 1e-5 if kind in ("weights", "ema") else 1e-6
        whole, offloaded = (tensors(runs / x, kind, UPDATES) for x in ("zero1", name))
        assert whole.keys() == offloaded.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(offloaded[key], tensor, rtol=0, atol=tolerance, msg=key)
