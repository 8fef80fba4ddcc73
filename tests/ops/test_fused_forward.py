"""The forward of csrc/fused: the PTX that NVRTC makes of it, executed by the simulator."""

import ctypes
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from irpe_ds.ops import fused_kernels, irpe_attention
from irpe_ds.ops.factors import Factors, factor, transposed
from irpe_ds.ops.fused_kernels import Operand, Rpe, Shape, by_slot, plan_forward
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps
from tests.ops.ptxsim import LIMITS, Simulator

pytest_plugins = ["tests.ops.ptxsim.fixtures"]
Grid = tuple[int, int]
ORDERS = ("first", "last", "random")


class SimulatedDevice:
    """A GPU of few multiprocessors, so that a block takes several images."""

    def __init__(self, driver: ctypes.CDLL, capability: str = "90", num_sms: int = 4) -> None:
        self.driver, self.num_sms = driver, num_sms
        self.architecture = f"compute_{capability}"
        self.shared_bytes = LIMITS[capability]

    def stream(self) -> None:
        return None


class Case(NamedTuple):
    """A call of the forward: what relative position is on, and the shape."""

    on: str = "k"
    method: str = "product"
    mode: str = "contextual"
    ratio: float = 1.9
    grid: Grid = (14, 14)
    num_prefix: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    heads: int = 2
    shared_heads: bool = True

    @property
    def maps(self) -> list[BucketMap]:
        rpe = RPEConfig(method=self.method, mode=self.mode, on="k", ratio=self.ratio)
        return build_maps(rpe, *self.grid, self.num_prefix)

    def factors(self, target: str) -> Factors:
        found = factor(self.maps)
        return transposed(found) if target == "q" else found

    def shape(self, **options: bool) -> Shape:
        rpes = [
            Rpe.of(self.factors(target), self.num_prefix, self.mode == "bias")
            if target in self.on
            else Rpe()
            for target in "qkv"
        ]
        return Shape(self.dtype, self.head_dim, self.grid, self.num_prefix, *rpes, **options)


class Problem:
    """Random inputs of a case, in its precision."""

    def __init__(self, case: Case) -> None:
        self.case = case
        length = case.shape().tokens

        def numbers(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape) * std).to(case.dtype)

        self.qkv = [
            numbers(case.batch, length, case.heads, case.head_dim).transpose(1, 2) for _ in "qkv"
        ]
        heads = 1 if case.shared_heads else case.heads
        dim = 1 if case.mode == "bias" else case.head_dim
        self.tables = {
            target: [numbers(heads, m.num_buckets, dim, std=0.5) for m in case.maps]
            for target in case.on
        }
        self.key_padding_mask: Tensor | None = None

    def fused(
        self, device: SimulatedDevice, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        case, scale = self.case, self.case.head_dim**-0.5
        shape = case.shape(has_mask=self.key_padding_mask is not None, has_dropout=dropout_p > 0)
        operands: dict[str, Operand | None] = dict.fromkeys("qkv")
        for target in case.on:
            factors = case.factors(target)
            table = by_slot(self.tables[target], factors, getattr(shape, f"rpe_{target}"))
            if case.mode == "bias":
                table = (table / scale).squeeze(-1)
            operands[target] = Operand(table, factors)
        return fused_kernels.forward(
            *self.qkv,
            *operands.values(),
            shape=shape,
            scale=scale,
            device=device,
            key_padding_mask=self.key_padding_mask,
            dropout_p=dropout_p,
            seed=seed,
        )

    def expected(self, dtype: torch.dtype) -> Tensor:
        terms = {}
        for target in self.case.on:
            tables = [table.to(dtype) for table in self.tables[target]]
            if target != "v":
                tables = [table.transpose(1, 2) for table in tables]
            if self.case.mode == "bias":
                tables = [table.squeeze(1) for table in tables]
            terms[f"rpe_{target}"] = tuple(zip(tables, self.case.maps, strict=True))
        return irpe_attention(
            *(x.to(dtype) for x in self.qkv),
            **terms,
            key_padding_mask=self.key_padding_mask,
            impl="reference",
        )

    def check(self, simulator: Simulator, device: SimulatedDevice) -> None:
        """The error is at most twice eager PyTorch's, and every order of warps gives one result."""
        results = []
        for order in ORDERS:
            with simulator.options(order=order):
                results.append(self.fused(device))
        assert not simulator.findings()
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0])
            assert torch.equal(lse, results[0][1])
        (got, lse), exact = results[0], self.expected(torch.float64)
        assert got.shape == exact.shape
        assert not lse.isnan().any()
        eager = self.expected(self.case.dtype)
        error, allowed = (rms(x.double() - exact) for x in (got, eager))
        rounding = torch.finfo(got.dtype).eps / 4 * rms(exact)
        assert error <= 2 * allowed + rounding, f"{error:.2e}, eager {allowed:.2e}"


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on", ["", "q", "k", "v", "qk", "kv", "qkv"])
def test_every_target(simulator: Simulator, on: str, dtype: torch.dtype) -> None:
    case = Case(on, dtype=dtype, batch=3, shared_heads=False)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize("mode", ["contextual", "bias"])
@pytest.mark.parametrize(
    ("method", "ratio", "grid"),
    [
        *(("euclidean", 1.9, (5, 9)), ("euclidean", 20, (14, 14)), ("quantization", 1.9, (7, 10))),
        *(("quantization", 33, (14, 14)), ("cross", 1.9, (14, 14)), ("product", 2.5, (9, 12))),
    ],
)
def test_every_encoding(
    simulator: Simulator, method: str, ratio: float, grid: Grid, mode: str
) -> None:
    case = Case("k" if mode == "bias" else "qk", method, mode, ratio, grid, batch=1, num_prefix=2)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize(
    ("grid", "num_prefix"),
    [
        *(((1, 1), 0), ((1, 1), 1), ((3, 2), 1), ((1, 40), 3), ((40, 1), 0), ((2, 3), 20)),
        *(((7, 7), 1), ((16, 8), 1), ((8, 24), 4), ((16, 16), 0), ((16, 16), 5), ((24, 24), 1)),
    ],
)
def test_every_grid(simulator: Simulator, grid: Grid, num_prefix: int) -> None:
    case = Case("qkv", grid=grid, num_prefix=num_prefix, batch=1, heads=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 72, 80, 88, 96, 104, 128])
def test_every_head_dim(simulator: Simulator, head_dim: int) -> None:
    case = Case("qkv", grid=(7, 9), head_dim=head_dim, batch=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("capability", ["80", "86", "90"])
def test_on_every_gpu(simulator: Simulator, capability: str, num_sms: int) -> None:
    with simulator.architecture(capability):
        device = SimulatedDevice(simulator.driver, capability, num_sms)
        Problem(Case("kv", batch=3)).check(simulator, device)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(32, 32), (37, 37), (64, 64)])
def test_long(simulator: Simulator, grid: Grid) -> None:
    case = Case("kv", grid=grid, batch=1, heads=1)
    Problem(case).check(simulator, SimulatedDevice(simulator.driver))


def test_masked_keys_have_no_part(simulator: Simulator) -> None:
    """A whole image's keys may be masked: its output is zero, as that of the reference."""
    problem = Problem(Case("qkv", grid=(5, 9), batch=4))
    length = problem.case.shape().tokens
    mask = torch.zeros(4, length, dtype=torch.bool)
    mask[0] = torch.rand(length) < 0.5
    mask[1, :32] = True
    mask[2] = True
    problem.key_padding_mask = mask
    problem.check(simulator, SimulatedDevice(simulator.driver))
    out, lse = problem.fused(SimulatedDevice(simulator.driver))
    assert not out[2].any()
    assert bool((lse[2] == float("inf")).all())


@pytest.mark.parametrize("on", ["", "qkv"])
def test_dropout_leaves_the_rest_scaled_up(simulator: Simulator, on: str) -> None:
    case = Case(on, grid=(7, 9), batch=2)
    problem, device = Problem(case), SimulatedDevice(simulator.driver)
    values = problem.qkv[2]
    rpe_v = problem.tables.pop("v", None)
    problem.case = case._replace(on=on.replace("v", ""))
    values[:] = torch.eye(64)  # so that the output is the weights, L = D = 64
    weights = problem.fused(device)[0].float()
    seed = torch.tensor([2**40 + 3])
    dropped = problem.fused(device, 0.25, seed)[0].float()
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(dropped[kept] * 0.75, weights[kept], rtol=0.02, atol=1e-3)
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept, problem.fused(device, 0.25, seed + 1)[0] != 0)
    if rpe_v is not None:  # the same are dropped from the bucket sums
        problem.tables["v"], problem.case = rpe_v, case
        got = problem.fused(device, 0.25, seed)[0]
        (buckets,) = case.maps
        added = rpe_v[0][0][buckets.ids.long()].double()  # (L, L, D)
        want = dropped.double() + torch.einsum("bhij,ijd->bhid", dropped.double(), added)
        assert rms(got.double() - want) < 0.01 * rms(want)
    assert not simulator.findings()


def test_the_lookup_is_the_gathered_number(simulator: Simulator) -> None:
    """To the bit. With one-hot queries, q_i k_j^T can be the number that is looked up."""
    case = Case("k", grid=(7, 9), batch=1, heads=1)
    problem, device = Problem(case), SimulatedDevice(simulator.driver)
    (buckets,) = case.maps
    q, k, _ = problem.qkv
    q[0, 0] = torch.eye(64)
    k[0, 0] = problem.tables["k"][0][0].T.gather(1, buckets.ids.long()).T
    problem.case = case._replace(on="")
    by_product = problem.fused(device)
    k.zero_()
    problem.case = case
    by_lookup = problem.fused(device)
    assert torch.equal(by_product[0], by_lookup[0])
    assert torch.equal(by_product[1], by_lookup[1])


@pytest.mark.parametrize(
    ("capability", "on", "head_dims"),
    [
        *(("80", "k", (32, 64, 128)), ("86", "k", (32, 64)), ("90", "k", (32, 64, 128))),
        *(("80", "kv", (32, 64, 128)), ("86", "kv", (32, 64)), ("90", "kv", (32, 64, 128))),
    ],
)
def test_a_multiprocessor_has_8_warps(capability: str, on: str, head_dims: tuple[int, ...]) -> None:
    for head_dim in head_dims:
        plan = plan_forward(Case(on, head_dim=head_dim).shape(), LIMITS[capability])
        assert plan is not None
        assert plan.warps == 8


def test_what_does_not_fit_has_no_plan() -> None:
    assert plan_forward(Case("kv", "euclidean", ratio=20).shape(), LIMITS["86"]) is None
    with pytest.raises(ValueError, match="at most 16 column classes, got 28"):
        Case("k", "cross", ratio=20).shape()


@pytest.mark.parametrize("method", ["product", "euclidean", "quantization", "cross"])
@pytest.mark.parametrize(("grid", "num_prefix", "ratio"), [((5, 9), 2, 1.9), ((14, 14), 0, 20)])
def test_factors_are_the_map(method: str, grid: Grid, num_prefix: int, ratio: float) -> None:
    maps = Case(method=method, grid=grid, num_prefix=num_prefix, ratio=ratio).maps
    buckets, row_class, column_class = factor(maps)
    height, width = grid
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    rows = row_class.long()[y[:, None] - y + height - 1]
    columns = column_class.long()[x[:, None] - x + width - 1]
    for each, matrix in zip(maps, buckets, strict=True):
        assert torch.equal(matrix[rows, columns], each.ids[num_prefix:, num_prefix:].long())
        assert num_prefix == 0 or bool((matrix[:, -1] == each.num_buckets - 1).all())
