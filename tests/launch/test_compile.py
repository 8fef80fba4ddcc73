"""train.compile: the compiled model trains as the other does, also where ZeRO-3 partitions it."""

from pathlib import Path

import pytest
import torch

from tests.launch.outcomes import losses, zero
from tests.launch.ranks import Ranks

UPDATES = 2


@pytest.mark.dist
@pytest.mark.slow
def test_it_trains_the_same_under_zero3(common: list[str], output: Path, tmp_path: Path) -> None:
    small = [*common, *zero(3), "model.options.depth=1", f"train.max_updates={UPDATES}"]
    names = {flag: f"compiled-{flag}" for flag in ("false", "true")}
    runs = [
        ([*small, f"name={name}", f"train.compile={flag}"], "never") for flag, name in names.items()
    ]
    Ranks(tmp_path, 2, runs).succeed()
    plain, compiled = (losses(output / name, UPDATES) for name in names.values())
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
