"""One implementation against another: the output and every gradient."""

from typing import Any

import torch
from torch import Tensor

from irpe_ds.ops import irpe_attention
from irpe_ds.rpe.config import RPEConfig

ENCODINGS = [
    RPEConfig(method=method, mode=mode, on="qk", ratio=1.9, shared_heads=shared)
    for method in ("product", "euclidean", "quantization", "cross")
    for mode in ("contextual", "bias")
    for shared in (True, False)
]


def ids(rpe: RPEConfig) -> str:
    return f"{rpe.method}-{rpe.mode}-{'shared' if rpe.shared_heads else 'per_head'}"


def leaves_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Queries, keys, values and every table in the arguments of irpe_attention, as `rpe_k[0]`."""
    tables = {
        f"{name}[{number}]": table
        for name in ("rpe_q", "rpe_k", "rpe_v")
        for number, (table, _) in enumerate(inputs.get(name, ()))
    }
    return {name: inputs[name] for name in "qkv"} | tables


def moved(inputs: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers as new leaves elsewhere or in another dtype; the maps move along."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype).requires_grad_()

    return {
        name: leaf(x) if name in "qkv" else tuple((leaf(t), m.to(device)) for t, m in x)
        for name, x in inputs.items()
    }


def results(inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Output and gradients, for one gradient of the output that depends on its shape alone."""
    leaves = leaves_of(inputs)
    out = irpe_attention(**inputs, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_equals_the_reference(inputs: dict[str, Any], impl: str, **options: Any) -> None:
    """To float64's precision."""
    expected = results(inputs, impl="reference", **options)
    for name, got in results(inputs, impl=impl, **options).items():
        torch.testing.assert_close(got, expected[name], msg=lambda text, n=name: f"{n}: {text}")


def assert_as_exact_as_the_reference(
    inputs: dict[str, Any], impl: str, device: str = "cpu", **options: Any
) -> None:
    """The error is at most twice that of the reference in the same low precision.

    Errors are root mean squares, and a quarter of the dtype's epsilon is granted on top.
    """
    inputs = moved(inputs, device, inputs["q"].dtype)
    exact = results(moved(inputs, device, torch.float64), impl="reference", **options)
    eager = results(inputs, impl="reference", **options)
    for name, got in results(inputs, impl=impl, **options).items():
        assert got.dtype == inputs["q"].dtype
        want = exact[name]
        error, allowed, size = (
            x.double().square().mean().sqrt() for x in (got - want, eager[name] - want, want)
        )
        rounding = torch.finfo(got.dtype).eps / 4 * size
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, reference {allowed:.2e}"
