"""Small random inputs of the attention op."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from irpe_ds import ops
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, build_table


@pytest.fixture(params=("reference", "gather", "cpu"))
def irpe_attention(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """The public op, by each implementation that runs here."""
    return partial(ops.irpe_attention, impl=request.param)


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Any]]:
    """make_inputs(rpe, ...) gives keyword arguments of irpe_attention, all leaves with gradient."""

    def make(
        rpe: RPEConfig | None = None,
        *,
        grid: tuple[int, int] = (2, 3),
        skip: int = 1,
        batch: int = 2,
        heads: int = 2,
        head_dim: int = 4,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Any]:
        length = skip + grid[0] * grid[1]
        inputs: dict[str, Any] = {
            name: torch.randn(batch, heads, length, head_dim, dtype=dtype, requires_grad=True)
            for name in "qkv"
        }
        for target in rpe.on if rpe else "":
            table = build_table(rpe, target, build_maps(rpe, *grid, skip), heads, head_dim)
            for parameter in table.to(dtype).parameters():
                torch.nn.init.normal_(parameter)
            inputs[f"rpe_{target}"] = table.terms()
        return inputs

    return make
