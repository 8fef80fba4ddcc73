"""Every implementation against what the released one computes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from irpe_ds import ops
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, build_table

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "attention.npz")
GOLDEN_CASES = [key.removesuffix("|out") for key in GOLDEN if key.endswith("|out")]
COMPILED = ("gather", "cpu")
Attention = Callable[..., Tensor]

RELEASED_METHODS = {"euc": "euclidean", "quant": "quantization"}


class GoldenCase:
    """One case of the released implementation: its inputs anew, its results as stored."""

    def __init__(self, case: str, fill: Callable[[str, tuple[int, ...], float], Tensor]) -> None:
        method, mode, sharing, on, heads, head_dim, grid, skip, ratio, batch = case.split("|")
        height, width = map(int, grid.split("x"))
        H, D, skip_tokens, B = (int(x.partition("=")[2]) for x in (heads, head_dim, skip, batch))
        rpe = RPEConfig(
            method=RELEASED_METHODS.get(method, method),
            mode=mode,
            on=on,
            ratio=float(ratio.partition("=")[2]),
            shared_heads=sharing == "shared",
        )
        shape = (B, H, skip_tokens + height * width, D)
        self.leaves = {name: fill(f"{case}|{name}", shape, 1.0) for name in "qkv"}
        self.maps = build_maps(rpe, height, width, skip_tokens)
        self.tables = {}
        for target in on:
            table = build_table(rpe, target, self.maps, H, D).double()
            for key, parameter in table.named_parameters(prefix=f"rpe_{target}"):
                self.leaves[key] = fill(f"{case}|{key}", tuple(parameter.shape), 0.5)
                self.tables.setdefault(f"rpe_{target}", []).append(key)
        self.grad_out = fill(f"{case}|grad_out", shape, 1.0)
        stored = {key.rpartition("|")[2] for key in GOLDEN if key.startswith(f"{case}|")}
        self.results = {
            name: torch.from_numpy(GOLDEN[f"{case}|{name}"]).double() for name in stored
        }

    def run(
        self, attention: Attention, dtype: torch.dtype, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Output and every gradient in float64 on the CPU, of a computation in dtype on device."""
        leaves = {name: x.to(device, dtype).requires_grad_() for name, x in self.leaves.items()}
        maps = [buckets.to(device) for buckets in self.maps]
        terms = {
            target: tuple(zip((leaves[key] for key in keys), maps, strict=True))
            for target, keys in self.tables.items()
        }
        out = attention(*(leaves[name] for name in "qkv"), **terms)
        assert out.dtype == dtype
        out.backward(self.grad_out.to(device, dtype))
        results = {"out": out.detach(), **{f"grad_{n}": leaf.grad for n, leaf in leaves.items()}}
        return {name: x.double().cpu() for name, x in results.items()}

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """The largest error of each result, relative to the largest number of it."""
        assert results.keys() == self.results.keys()
        return {
            name: ((results[name] - golden).abs().max() / golden.abs().max()).item()
            for name, golden in self.results.items()
        }


@pytest.mark.parametrize("case", GOLDEN_CASES)
class TestGolden:
    def test_output_and_every_gradient(
        self, irpe_attention: Attention, case: str, fill: Callable[..., Tensor]
    ) -> None:
        golden = GoldenCase(case, fill)
        errors = golden.errors(golden.run(irpe_attention, torch.float64))
        assert max(errors.values()) < 1e-5

    @pytest.mark.parametrize(
        ("dtype", "roundings"), [(torch.float32, 3), (torch.bfloat16, 1), (torch.float16, 1)]
    )
    @pytest.mark.parametrize("impl", COMPILED)
    def test_low_precision_is_as_good_as_eager(
        self, impl: str, dtype: torch.dtype, roundings: int, case: str, fill: Callable[..., Tensor]
    ) -> None:
        """At most twice the error of the reference in the same dtype, plus a few roundings.

        Float32 gets three of them: its error is the order of sums, and eager is sometimes lucky.
        """
        golden = GoldenCase(case, fill)
        eager = golden.errors(golden.run(partial(ops.irpe_attention, impl="reference"), dtype))
        errors = golden.errors(golden.run(partial(ops.irpe_attention, impl=impl), dtype))
        for name, error in errors.items():
            assert error <= 2 * eager[name] + roundings * torch.finfo(dtype).eps, name

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        ("dtype", "roundings"), [(torch.float32, 3), (torch.bfloat16, 1), (torch.float16, 1)]
    )
    def test_on_a_gpu(
        self, dtype: torch.dtype, roundings: int, case: str, fill: Callable[..., Tensor]
    ) -> None:
        golden = GoldenCase(case, fill)
        reference, gather = (partial(ops.irpe_attention, impl=i) for i in ("reference", "gather"))
        exact = golden.errors(golden.run(gather, torch.float64, "cuda"))
        assert max(exact.values()) < 1e-5
        eager = golden.errors(golden.run(reference, dtype, "cuda"))
        results = golden.run(gather, dtype, "cuda")
        for name, error in golden.errors(results).items():
            assert error <= 2 * eager[name] + roundings * torch.finfo(dtype).eps, name
        again = golden.run(gather, dtype, "cuda")
        assert all(torch.equal(results[name], again[name]) for name in results)


def test_golden_covers_every_table() -> None:
    assert len(GOLDEN_CASES) == 48
    assert {case.split("|")[0] for case in GOLDEN_CASES} == {"product", "euc", "quant", "cross"}
