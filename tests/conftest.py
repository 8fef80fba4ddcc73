"""What every test gets: a fixed seed, and GPU tests skipped where there is no GPU."""

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
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
