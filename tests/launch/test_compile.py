"""train.compile: the compiled model trains as the other does, also where ZeRO-3 partitions it."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.launch.outcomes import losses, zero
from tests.launch.ranks import Ranks

UPDATES = 2


def compile_with(backend: str) -> None:
    """Make DeepSpeed's engine compile with this backend, instead of inductor."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().set_compile_backend(backend)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_trains_the_same_under_zero3(
    backend: str, common: list[str], output: Path, tmp_path: Path
) -> None:
    """aot_eager traces as inductor does, without its minutes of C++."""
    small = [*common, *zero(3), "model.options.depth=1", f"train.max_updates={UPDATES}"]
    names = {flag: f"{backend}-{flag}" for flag in ("false", "true")}
    runs = [
        ([*small, f"name={name}", f"train.compile={flag}"], "never") for flag, name in names.items()
    ]
    Ranks(tmp_path, 2, runs, partial(compile_with, backend)).succeed()
    plain, compiled = (losses(output / name, UPDATES) for name in names.values())
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
