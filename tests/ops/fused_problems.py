"""Random problems of the fused kernels on a simulated GPU, and what eager PyTorch makes of them."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from irpe_ds.ops import dispatch, fused_op, irpe_attention
from irpe_ds.ops.factors import factor
from irpe_ds.ops.fused_op import Arguments
from irpe_ds.ops.fused_plan import Shape
from irpe_ds.ops.inputs import TermSpec
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


@contextmanager
def simulated(device: SimulatedDevice) -> Iterator[None]:
    """impl="fused" runs on CPU tensors, by this GPU."""
    _register_for_cpu()
    row = dispatch.IMPLEMENTATIONS["fused"]
    here = row._replace(devices=("cpu", "cuda"), unavailable_reason=lambda key: None)
    dispatch._resolve_and_warn.cache_clear()
    factor.cache_clear()  # those of this CPU may have been made outside the simulator's memory
    with (
        mock.patch.dict(dispatch.IMPLEMENTATIONS, fused=here),
        mock.patch.object(fused_op, "device_of", return_value=device),
    ):
        yield
    dispatch._resolve_and_warn.cache_clear()


@functools.cache
def _register_for_cpu() -> torch.library.Library:
    library = torch.library.Library("irpe_ds", "IMPL")
    for function in (fused_op.fused_forward, fused_op.fused_backward):
        library.impl(function.__name__, function, "CPU")
    return library


class Case(NamedTuple):
    """A call: what relative position is on, and the shape."""

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

    @property
    def specs(self) -> tuple[TermSpec, ...]:
        is_bias = self.mode == "bias"
        return tuple(
            TermSpec(target, each.method, self.grid, self.num_prefix, self.ratio, is_bias)
            for target in self.on
            for each in self.maps
        )

    def shape(self, *, keys: bool = False) -> Shape:
        """What the kernels for queries are compiled for, or that for keys."""
        grid = (*self.grid, self.num_prefix)
        return fused_op.shape(grid, self.specs, self.dtype, self.head_dim, keys=keys)


class Problem:
    """Random inputs of a case, in its precision."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        length = case.shape().tokens

        def numbers(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape) * std).to(device, case.dtype)

        # As of a projection: the heads of a token lie next to each other.
        self.leaves = {
            name: numbers(case.batch, length, case.heads, case.head_dim).transpose(1, 2)
            for name in "qkv"
        }
        self.grad_out = numbers(case.batch, length, case.heads, case.head_dim).transpose(1, 2)
        heads = 1 if case.shared_heads else case.heads
        self.maps = {}
        for target in case.on:
            for n, buckets in enumerate(case.maps):
                shape = [case.head_dim, buckets.num_buckets]
                shape = shape[1:] if case.mode == "bias" else shape[:: -1 if target == "v" else 1]
                self.leaves[f"rpe_{target}{n}"] = numbers(heads, *shape, std=0.5)
                self.maps[f"rpe_{target}{n}"] = buckets.to(device)
        self.options: dict[str, Any] = {}

    def run(
        self, impl: str = "fused", dtype: torch.dtype | None = None, *, backward: bool = True
    ) -> dict[str, Tensor]:
        """Output, and the gradient of every input."""
        leaves = {
            name: x.detach().to(dtype or x.dtype).requires_grad_(backward)
            for name, x in self.leaves.items()
        }
        terms = {
            f"rpe_{target}": tuple(
                (leaves[f"rpe_{target}{n}"], self.maps[f"rpe_{target}{n}"])
                for n in range(len(self.case.maps))
            )
            for target in self.case.on
        }
        out = irpe_attention(*(leaves[name] for name in "qkv"), **terms, **self.options, impl=impl)
        results = {"out": out.detach()}
        if backward:
            grad_out = self.grad_out.to(out.dtype)
            grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
            results |= dict(zip(leaves, grads, strict=True))
        return results

    def check(
        self, simulator: Simulator, device: SimulatedDevice, *, backward: bool = True
    ) -> dict[str, Tensor]:
        """Errors are at most twice eager PyTorch's, and every order of warps gives one result.

        Errors are root mean squares. A quarter of the dtype's epsilon, what rounding the result
        costs, is granted on top.
        """
        runs = []
        for order in ORDERS:
            with simulator.options(order=order), simulated(device):
                runs.append(self.run(backward=backward))
        assert not simulator.findings()
        for name, x in runs[0].items():
            assert all(torch.equal(run[name], x) for run in runs[1:]), name
        self.check_errors(runs[0])
        return runs[0]

    def check_errors(self, results: dict[str, Tensor]) -> None:
        """Of `run`."""
        backward = len(results) > 1
        exact = self.run("reference", torch.float64, backward=backward)
        eager = self.run("reference", backward=backward)
        for name, want in exact.items():
            got = results[name]
            assert got.dtype == self.case.dtype
            assert got.shape == want.shape
            error, allowed = (rms(x.double() - want) for x in (got, eager[name]))
            rounding = torch.finfo(got.dtype).eps / 4 * rms(want)
            assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, eager {allowed:.2e}"

    def arguments(self) -> Arguments:
        """This problem as the operators take it."""
        terms = [(name, x) for name, x in self.leaves.items() if name.startswith("rpe")]
        tables = [x.mT if x.dim() == 3 and "v" not in name else x for name, x in terms]
        maps = [self.maps[name] for name, _ in terms]
        return Arguments(
            *(self.leaves[name] for name in "qkv"),
            tables,
            ["qkv".index(name[4]) for name, _ in terms],
            [each.method for each in maps],
            [each.ratio for each in maps],
            [table.dim() == 2 for table in tables],
            [*self.case.grid, self.case.num_prefix],
            self.options.get("key_padding_mask"),
            None,
            self.options.get("scale", self.case.head_dim**-0.5),
            self.options.get("dropout_p", 0.0),
        )


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
