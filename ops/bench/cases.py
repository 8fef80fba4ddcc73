"""What is timed: the gather alone with its backward, and a whole training step of a DeiT."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from irpe_ds.models import equip
from irpe_ds.ops import dispatch, irpe_gather, reference
from irpe_ds.ops.bench import upstream
from irpe_ds.rpe import BucketMap, RPEConfig

Calls = dict[str, Callable[[], object]]
Table = tuple[str, Calls, tuple[str, ...]]
"""A title, what to call, by name, and the names that ratios are to."""


def gather(
    device: str, dtype: torch.dtype, batch: int, heads: int, released: upstream.Gather | None
) -> Iterator[Table]:
    """The gather for DeiT at 224 pixels and 50 buckets: with its backward, and that alone."""
    ids = BucketMap.build("product", 14, 14, 1).to(device).ids
    lookup = torch.randn(batch, heads, 197, 50, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, heads, 197, 197, device=device, dtype=dtype)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reference": reference.gather,
        "gather": irpe_gather,
    }
    if released is not None:
        functions["upstream"] = released

    def both(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(function(lookup, ids), lookup, grad)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, lookup, grad, retain_graph=True)

    shapes = f"{tuple(lookup.shape)} -> {tuple(grad.shape)}, {_name(dtype)}"
    calls: Calls = {name: partial(both, function) for name, function in functions.items()}
    yield f"gather + backward, {shapes}", calls, ("reference",)
    outs = {name: function(lookup, ids) for name, function in functions.items()}
    calls = {name: partial(backward, out) for name, out in outs.items()}
    yield f"backward of the gather, {shapes}", calls, ("reference",)


def step(
    device: str, dtype: torch.dtype, model: str, batch: int, released: upstream.Gather | None
) -> Table:
    """Forward and backward of a DeiT without an optimiser, plain and with RPE on k, qk and qkv."""
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    if released is not None:
        row = dispatch.Implementation(partial(upstream.attention, released))
        dispatch.IMPLEMENTATIONS["upstream"] = row

    def train(network: nn.Module) -> None:
        network.zero_grad(set_to_none=True)
        network(images).sum().backward()

    networks = {f"plain, {name}": network for name, network in _plain(model)}
    for on in ("k", "qk", "qkv"):
        for impl in dispatch.IMPLEMENTATIONS:
            network = equip(timm.create_model(model), RPEConfig(on=on), impl)
            case = network.blocks[0].attn.case(device, dtype)
            if dispatch.obstacle(impl, case) is None:
                networks[f"{on.upper()}, {impl}"] = network
    calls: Calls = {
        name: partial(train, network.to(device, dtype).train())
        for name, network in networks.items()
    }
    title = f"{model}, forward + backward, batch {batch}, {_name(dtype)}"
    return title, calls, ("plain, fused", "plain, eager")


def _plain(model: str) -> Iterator[tuple[str, nn.Module]]:
    for name in ("fused", "eager"):
        network: Any = timm.create_model(model)
        for block in network.blocks:
            block.attn.fused_attn = name == "fused"
        yield name, network


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
