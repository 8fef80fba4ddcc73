"""Small random inputs of the attention op."""

import fcntl
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from irpe_ds import ops
from irpe_ds.ops import dispatch
from irpe_ds.ops.build import library
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, build_table
from tests.ops.kernels.host import Host, build_attention


@pytest.fixture(params=("reference", "gather", "cpu"))
def irpe_attention(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """The public op, by each implementation that runs here."""
    return partial(ops.irpe_attention, impl=request.param)


@pytest.fixture(scope="session")
def fused_kernels(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The fused attention compiled for the host, its operators registered for CPU tensors."""
    assert library.load().cpu is None  # whose schemas they are
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one worker builds for all, the others wait
        folder = folder.parent
    with (folder / "attention.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = folder / "attention.so"
        if not built.exists():
            build_attention(folder)
    torch.ops.load_library(str(built))
    return Host(built)


@pytest.fixture
def host(fused_kernels: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """impl="fused" runs on the CPU too."""
    row = dispatch.IMPLEMENTATIONS["fused"]
    monkeypatch.setitem(
        dispatch.IMPLEMENTATIONS, "fused", row._replace(devices=("cpu", *row.devices))
    )
    return fused_kernels


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
