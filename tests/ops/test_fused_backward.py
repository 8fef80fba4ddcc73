"""The backward of csrc/fused: the PTX that NVRTC makes of it, executed by the simulator."""

import pytest
import torch

from tests.ops.fused_problems import Case, Grid, Problem, SimulatedDevice
from tests.ops.ptxsim import Simulator

pytest_plugins = ["tests.ops.ptxsim.fixtures"]


def slow(*values: object) -> object:
    """A case that `make test-slow` runs: compiling a kernel takes seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("grid", [(5, 9), slow((14, 14))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize("on", ["", "q", "k", "v", "qkv"])
def test_every_target(simulator: Simulator, on: str, dtype: torch.dtype, grid: Grid) -> None:
    problem = Problem(Case(on, dtype=dtype, grid=grid, batch=3, shared_heads=False))
    problem.check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize(
    ("method", "mode", "ratio", "grid"),
    [
        *(("cross", "contextual", 1.9, (5, 9)), ("quantization", "bias", 1.9, (7, 10))),
        *(("product", "contextual", 20, (7, 5)), ("euclidean", "contextual", 20, (7, 13))),
        slow("product", "contextual", 2.5, (9, 12)),
    ],
)
def test_every_encoding(
    simulator: Simulator, method: str, mode: str, ratio: float, grid: Grid
) -> None:
    case = Case("k", method, mode, ratio, grid, num_prefix=2, batch=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize(
    ("grid", "num_prefix"),
    [
        *(((1, 1), 1), ((8, 18), 0), ((2, 3), 20)),
        *(slow((16, 8), 1), slow((24, 24), 1), slow((18, 27), 1)),
    ],
)
def test_every_grid(simulator: Simulator, grid: Grid, num_prefix: int) -> None:
    case = Case("kv", grid=grid, num_prefix=num_prefix, batch=1, heads=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize(
    ("head_dim", "grid"),
    [(8, (11, 3)), slow(40, (11, 3)), (72, (8, 18)), slow(80, (16, 16)), slow(128, (11, 3))],
)
def test_every_head_dim(simulator: Simulator, head_dim: int, grid: Grid) -> None:
    """Above 8 strips of heads between 64 and 80 there are 11 warps."""
    case = Case("k", grid=grid, head_dim=head_dim, batch=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


def test_a_bucket_with_nearly_all_keys(simulator: Simulator) -> None:
    """The sum of dS over it is small, beside the rounding error of a large output's delta."""
    case = Case("kv", "quantization", grid=(14, 9), num_prefix=0, batch=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize("on", ["k", "kv"])  # two strips over keys, and one
def test_masked_keys_have_no_part(simulator: Simulator, on: str) -> None:
    problem = Problem(Case(on, grid=(5, 9), batch=2))
    mask = torch.rand(2, problem.case.shape().tokens) < 0.5
    problem.options["key_padding_mask"] = mask
    problem.check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize("on", ["qk", slow("qkv")])
def test_with_little_shared_memory(simulator: Simulator, on: str) -> None:
    """Smaller chunks, of padded grid rows."""
    with simulator.architecture("86"):
        problem = Problem(Case(on, batch=1, heads=1))
        problem.check(simulator, SimulatedDevice(simulator.driver, "86"))
