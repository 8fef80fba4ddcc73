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


def gather(
    device: str, dtype: torch.dtype, batch: int, heads: int, released: upstream.Gather | None
) -> tuple[str, Calls]:
    """Forward and backward of the gather for DeiT at 224 pixels, product method, 50 buckets."""
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
        lookup.grad = None
        function(lookup, ids).backward(grad)

    title = f"gather + backward, {tuple(lookup.shape)} -> {tuple(grad.shape)}, {_name(dtype)}"
    return title, {name: partial(both, function) for name, function in functions.items()}


def step(
    device: str, dtype: torch.dtype, model: str, batch: int, released: upstream.Gather | None
) -> tuple[str, Calls]:
    """Forward and backward of a DeiT without an optimiser, plain and with RPE on k, qk and qkv."""
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    impls = [name for name in dispatch.IMPLEMENTATIONS if _runs(name, device)]
    if released is not None:
        dispatch.IMPLEMENTATIONS["upstream"] = partial(upstream.attention, released)
        impls.append("upstream")

    def train(network: nn.Module) -> None:
        network.zero_grad(set_to_none=True)
        network(images).sum().backward()

    networks = {f"plain, {name}": network for name, network in _plain(model)}
    for on in ("k", "qk", "qkv"):
        for impl in impls:
            network = equip(timm.create_model(model), RPEConfig(on=on), impl)
            networks[f"{on.upper()}, {impl}"] = network
    calls: Calls = {
        name: partial(train, network.to(device, dtype).train())
        for name, network in networks.items()
    }
    return f"{model}, forward + backward, batch {batch}, {_name(dtype)}", calls


def _plain(model: str) -> Iterator[tuple[str, nn.Module]]:
    for name in ("fused", "eager"):
        network: Any = timm.create_model(model)
        for block in network.blocks:
            block.attn.fused_attn = name == "fused"
        yield name, network


def _runs(impl: str, device: str) -> bool:
    return dispatch.obstacle(impl, device) is None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
