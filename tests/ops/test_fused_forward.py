"""The forward of csrc/fused: the PTX that NVRTC makes of it, executed by the simulator."""

import pytest
import torch
from torch import Tensor

from irpe_ds.ops.fused_kernels import NEEDED
from irpe_ds.ops.fused_plan import forward_bytes, plan
from tests.ops.fused_problems import Case, Grid, Problem, SimulatedDevice, rms, simulated
from tests.ops.ptxsim import LIMITS, Simulator

pytest_plugins = ["tests.ops.ptxsim.fixtures"]


def slow(*values: object) -> object:
    """A case that `make test-slow` runs: compiling a kernel takes seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("grid", [(5, 9), slow((14, 14))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize("on", ["", "q", "k", "v", slow("qk"), slow("kv"), slow("qv"), "qkv"])
def test_every_target(simulator: Simulator, on: str, dtype: torch.dtype, grid: Grid) -> None:
    case = Case(on, dtype=dtype, grid=grid, batch=3, shared_heads=False)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver), backward=False)


def test_sums_of_many_large_weights_fit_in_half_precision(simulator: Simulator) -> None:
    """Weights that follow lower scores are above 1 until the softmax is rescaled."""
    case = Case("v", grid=(24, 24), head_dim=32, dtype=torch.float16, batch=1, heads=1)
    problem = Problem(case)
    problem.leaves["q"].fill_(1)
    problem.leaves["k"].fill_(5.4 / 32**0.5)  # 2^7.8 times the weights of the first keys
    problem.leaves["k"][:, :, :49] = 0
    problem.check(simulator, SimulatedDevice(simulator.driver), backward=False)


def test_deit(simulator: Simulator) -> None:
    problem = Problem(Case("qkv", batch=3, dtype=torch.float16))
    problem.check(simulator, SimulatedDevice(simulator.driver, num_sms=2), backward=False)


def test_factors_made_before_the_simulator(ptx_simulator: Simulator) -> None:
    """As by tests in the same process that only plan; they are none of its memory."""
    case = Case(grid=(5, 7), batch=1, heads=1)
    case.shape()
    with ptx_simulator.watch():
        Problem(case).check(ptx_simulator, SimulatedDevice(ptx_simulator.driver), backward=False)


@pytest.mark.parametrize("mode", ["contextual", "bias"])
@pytest.mark.parametrize(
    ("method", "ratio", "grid"),
    [
        *(("euclidean", 1.9, (5, 9)), ("quantization", 1.9, (7, 10)), ("cross", 1.9, (5, 9))),
        *(slow("euclidean", 20, (14, 14)), slow("quantization", 33, (14, 14))),
        *(("euclidean", 20, (7, 13)), ("product", 20, (7, 5)), slow("product", 2.5, (9, 12))),
    ],
)
def test_every_encoding(
    simulator: Simulator, method: str, ratio: float, grid: Grid, mode: str
) -> None:
    case = Case("k" if mode == "bias" else "qkv", method, mode, ratio, grid, batch=1, num_prefix=2)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver), backward=False)


@pytest.mark.parametrize(
    ("grid", "num_prefix"),
    [
        *(((1, 1), 0), ((3, 2), 1), ((1, 40), 3), ((20, 2), 0), ((2, 3), 20), ((8, 18), 1)),
        *(slow((1, 1), 1), ((40, 1), 0), slow((16, 8), 1), slow((8, 24), 4)),
        *(slow((16, 16), 0), slow((16, 16), 5), slow((24, 24), 1), slow((18, 27), 1)),
    ],
)
def test_every_grid(simulator: Simulator, grid: Grid, num_prefix: int) -> None:
    case = Case("qkv", grid=grid, num_prefix=num_prefix, batch=1, heads=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver), backward=False)


HEAD_DIMS = (8, slow(16), 24, slow(32), slow(40), 72, slow(80), slow(88), slow(96), slow(104), 128)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(simulator: Simulator, head_dim: int) -> None:
    case = Case("qkv", grid=(11, 3), head_dim=head_dim, batch=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver), backward=False)


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("capability", ["80", "86", "90"])
def test_on_every_gpu(simulator: Simulator, capability: str, num_sms: int) -> None:
    with simulator.architecture(capability):
        device = SimulatedDevice(simulator.driver, capability, num_sms)
        Problem(Case("kv", grid=(7, 7), batch=3)).check(simulator, device, backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(32, 32), (37, 37), (64, 64)])
def test_long(simulator: Simulator, grid: Grid) -> None:
    case = Case("kv", grid=grid, batch=1, heads=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver), backward=False)


def test_masked_keys_have_no_part(simulator: Simulator) -> None:
    """A whole image's keys may be masked: its output is zero, as that of the reference."""
    problem = Problem(Case("qkv", grid=(5, 9), batch=4))
    length = problem.case.shape().tokens
    mask = torch.zeros(4, length, dtype=torch.bool)
    mask[0] = torch.rand(length) < 0.5
    mask[1, :32] = True
    mask[2] = True
    problem.options["key_padding_mask"] = mask
    out = problem.check(simulator, SimulatedDevice(simulator.driver), backward=False)["out"]
    assert not out[2].any()


@pytest.mark.parametrize("on", ["", "qkv"])
def test_dropout_leaves_the_rest_scaled_up(simulator: Simulator, on: str) -> None:
    case = Case(on, grid=(7, 9), batch=2)
    problem, device = Problem(case), SimulatedDevice(simulator.driver)
    values = problem.leaves["v"]
    problem.case = case._replace(on=on.replace("v", ""))
    values[:] = torch.eye(64)  # so that the output is the weights, L = D = 64
    with simulated(device):
        weights = problem.run(backward=False)["out"].float()
        problem.options["dropout_p"] = 0.25

        def run(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return problem.run(backward=False)["out"]

        dropped = run(3).float()
        kept = dropped != 0
        assert abs(kept.float().mean() - 0.75) < 0.02
        torch.testing.assert_close(dropped[kept] * 0.75, weights[kept], rtol=0.02, atol=1e-3)
        assert not torch.equal(kept[0], kept[1])
        assert not torch.equal(kept, run(4) != 0)
        if "v" in on:  # the same are dropped from the bucket sums
            problem.case = case
            added = problem.leaves["rpe_v0"][0][problem.maps["rpe_v0"].ids.long()].double()
            want = dropped.double() + torch.einsum("bhij,ijd->bhid", dropped.double(), added)
            assert rms(run(3).double() - want) < 0.01 * rms(want)
    assert not simulator.findings()


def test_the_lookup_is_the_gathered_number(simulator: Simulator) -> None:
    """To the bit. With one-hot queries, q_i k_j^T can be the number that is looked up."""
    case = Case("k", grid=(7, 9), batch=1, heads=1)
    problem, device = Problem(case), SimulatedDevice(simulator.driver)
    (buckets,) = case.maps
    q, k = problem.leaves["q"], problem.leaves["k"]
    q[0, 0] = torch.eye(64)
    k[0, 0] = problem.leaves["rpe_k0"][0].gather(1, buckets.ids.long()).T
    with simulated(device):
        by_lookup = problem.arguments()
        without = {key: [] for key in ("tables", "targets", "methods", "ratios", "biases")}
        forward = torch.ops.irpe_ds.fused_forward
        by_product = forward(*by_lookup._replace(**without), False)
        k.zero_()
        for x, y in zip(by_product, forward(*by_lookup, False), strict=True):
            assert torch.equal(x, y)


def test_bucket_sums_are_kept_for_a_backward_alone(simulator: Simulator) -> None:
    problem = Problem(Case("v", grid=(7, 9), batch=1, heads=1))
    with simulated(SimulatedDevice(simulator.driver)):
        forward = torch.ops.irpe_ds.fused_forward
        out, lse, sums = forward(*problem.arguments(), True)
        alone = forward(*problem.arguments(), False)
    assert torch.equal(out, alone[0])
    assert torch.equal(lse, alone[1])
    assert alone[2].numel() == 0
    torch.testing.assert_close(sums.float().sum(-1), torch.ones(1, 64, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("kernel", list(NEEDED))
@pytest.mark.parametrize("on", ["k", "qk", "kv", "qkv"])
@pytest.mark.parametrize("capability", ["80", "86", "90"])
def test_a_multiprocessor_has_8_warps(capability: str, on: str, kernel: str) -> None:
    has_room_for_128 = capability == "90" or (capability == "80" and on != "qkv")
    for head_dim in (32, 64, 128) if has_room_for_128 else (32, 64):
        shape = Case(on, head_dim=head_dim).shape(keys=kernel == "backward_keys")
        found = plan(shape, LIMITS[capability], NEEDED[kernel])
        assert found is not None
        assert found.warps == 8, head_dim


@pytest.mark.parametrize("kernel", list(NEEDED))
@pytest.mark.parametrize("capability", ["80", "86", "90"])
def test_plans_fit(capability: str, kernel: str) -> None:
    """With many small chunks too, whose mbarriers take more than 128 bytes."""
    small = [("bias", 20, (height, width)) for height in range(2, 15) for width in range(1, 7)]
    large = [("contextual", 1.9, (size, size)) for size in range(1, 33)]
    for mode, ratio, grid in small + large:
        shape = Case("k", "cross", mode, ratio, grid).shape(keys=kernel == "backward_keys")
        found = plan(shape, LIMITS[capability], NEEDED[kernel])
        assert found is None or NEEDED[kernel](shape, found) <= LIMITS[capability], grid


def test_what_does_not_fit_has_no_plan() -> None:
    shape = Case("kv", "euclidean", ratio=20).shape()
    assert plan(shape, LIMITS["86"], forward_bytes) is None
    assert plan(Case("k", grid=(3, 65)).shape(), LIMITS["90"], forward_bytes) is None
    with pytest.raises(ValueError, match="at most 16 column classes, got 28"):
        Case("k", "cross", ratio=20).shape()
