"""Random problems of the fused kernels on a simulated GPU, and what eager PyTorch makes of them."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ds.ops import fused_kernels, irpe_attention
from irpe_ds.ops.factors import Factors, factor, transposed
from irpe_ds.ops.fused_kernels import Call, Operand, by_slot
from irpe_ds.ops.fused_plan import Rpe, Shape
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps
from tests.ops.ptxsim import LIMITS, Simulator

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
        self.grad_out = numbers(case.batch, length, case.heads, case.head_dim).transpose(1, 2)
        heads = 1 if case.shared_heads else case.heads
        dim = 1 if case.mode == "bias" else case.head_dim
        self.tables = {
            target: [numbers(heads, m.num_buckets, dim, std=0.5) for m in case.maps]
            for target in case.on
        }
        self.key_padding_mask: Tensor | None = None

    def call(self, dropout_p: float = 0.0, seed: Tensor | None = None) -> Call:
        """This problem as the kernels take it."""
        case, scale = self.case, self.case.head_dim**-0.5
        shape = case.shape(has_mask=self.key_padding_mask is not None, has_dropout=dropout_p > 0)
        operands: dict[str, Operand | None] = dict.fromkeys("qkv")
        for target in case.on:
            factors = case.factors(target)
            table = by_slot(self.tables[target], factors, getattr(shape, f"rpe_{target}"))
            if case.mode == "bias":
                table = (table / scale).squeeze(-1)
            operands[target] = Operand(table, factors)
        options = (self.key_padding_mask, dropout_p, seed)
        return Call(*self.qkv, *operands.values(), shape, scale, *options)

    def fused(
        self, device: SimulatedDevice, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return fused_kernels.forward(self.call(dropout_p, seed), device)

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

    def expected_grads(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of q, k, v and of every target's tables, in the order of the maps."""
        before = self.qkv, self.tables
        self.qkv = [x.detach().to(dtype).requires_grad_() for x in self.qkv]
        self.tables = {
            target: [table.detach().to(dtype).requires_grad_() for table in tables]
            for target, tables in self.tables.items()
        }
        leaves = dict(zip("qkv", self.qkv, strict=True))
        for target, tables in self.tables.items():
            leaves |= {f"table_{target}{n}": table for n, table in enumerate(tables)}
        grad_out = self.grad_out.to(dtype)
        grads = torch.autograd.grad(self.expected(dtype), list(leaves.values()), grad_out)
        self.qkv, self.tables = before
        return dict(zip(leaves, grads, strict=True))

    def fused_grads(self, device: SimulatedDevice) -> dict[str, Tensor]:
        """The same by the kernels, as far as there are."""
        call = self.call()
        out, lse = fused_kernels.forward(call, device)
        grad_q, _, sums_k, sums_v = fused_kernels.backward_queries(
            call, out, lse, self.grad_out, device
        )
        found = {"q": grad_q}
        rows = {"k": (call.q * call.scale, sums_k), "v": (self.grad_out, sums_v)}
        for target in set(self.case.on) & set(rows):
            x, sums = rows[target]
            if self.case.mode == "bias":
                grad = sums.float().sum((0, 1)).unsqueeze(-1)
            else:
                grad = torch.einsum("bhld,blhr->hrd", x.float(), sums.float())
            if self.case.shared_heads:
                grad = grad.sum(0, keepdim=True)
            tables = [table.float().requires_grad_() for table in self.tables[target]]
            rpe = getattr(call.shape, f"rpe_{target}")
            by_class = by_slot(tables, self.case.factors(target), rpe)
            grads = torch.autograd.grad(by_class, tables, grad)
            found |= {f"table_{target}{n}": x.to(grad_q.dtype) for n, x in enumerate(grads)}
        return found

    def check_grads(self, simulator: Simulator, device: SimulatedDevice) -> None:
        """As `check`, of every gradient."""
        results = []
        for order in ORDERS:
            with simulator.options(order=order):
                results.append(self.fused_grads(device))
        assert not simulator.findings()
        exact, eager = (self.expected_grads(x) for x in (torch.float64, self.case.dtype))
        for name, got in results[0].items():
            assert all(torch.equal(other[name], got) for other in results[1:]), name
            error, allowed = (rms(x.double() - exact[name]) for x in (got, eager[name]))
            rounding = torch.finfo(self.case.dtype).eps / 4 * rms(exact[name])
            assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, eager {allowed:.2e}"

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
