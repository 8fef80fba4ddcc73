"""What every test gets: a fixed seed, and marks that follow from where it is."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

THOROUGH = (
    *("benchmark", "launch", "models", "planner", "plots", "test_docs", "test_runlog_wandb"),
    *("data/augment", "data/beton/test_convert", "data/beton/test_damage"),
    *("data/beton/test_shards", "data/beton/test_sources", "data/pipelines", "data/test_crops"),
    *("data/test_description", "data/test_digits", "data/test_loaders", "data/test_offsets"),
    "data/test_synthetic",
    *("ops/build", "ops/test_bench", "ops/test_flex", "ops/test_fused", "ops/test_gather"),
    *("ops/test_implementations", "ops/test_low_rank", "ops/test_package", "ops/test_ptxsim"),
    "training/test_placement",
)
"""Tests of more than seconds, by the beginning of their path: `make check` leaves them out."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.args == config.getini("testpaths"):
        collected = {item.path for item in items}
        left_out = sorted(set(Path(__file__).parent.rglob("test_*.py")) - collected)
        if left_out:  # pytest itself leaves out folders of some names
            raise pytest.UsageError(f"not collected: {', '.join(map(str, left_out))}")
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(THOROUGH):
            item.add_marker(pytest.mark.thorough)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fill() -> Callable[[str, tuple[int, ...], float], Tensor]:
    """The golden data's weights and inputs, made from their names: fill(name, shape, std)."""

    def fill(name: str, shape: tuple[int, ...], std: float) -> Tensor:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return torch.from_numpy(rng.standard_normal(shape) * std)

    return fill
