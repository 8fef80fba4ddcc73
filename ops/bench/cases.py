"""The cases that are timed: the gather, the attention op, and a training step of a DeiT."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from irpe_ds.models import equip
from irpe_ds.ops import DispatchKey, dispatch, irpe_gather, reference
from irpe_ds.ops.bench import upstream
from irpe_ds.ops.gather import lookup_of
from irpe_ds.ops.inputs import Inputs
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, build_table

Calls = dict[str, Callable[[], object]]
Comparison = tuple[str, Calls, tuple[str, ...]]
"""A title, the calls to time by name, and the names of the baselines."""

ENCODINGS = {
    "K": RPEConfig(on="k"),
    "QK": RPEConfig(on="qk"),
    "QKV": RPEConfig(on="qkv"),
    "bias K": RPEConfig(on="k", mode="bias"),
    "cross K": RPEConfig(on="k", method="cross", ratio=1.9),
}


def gather(
    device: str, dtype: torch.dtype, batch: int, heads: int, released: upstream.Gather | None
) -> Iterator[Comparison]:
    """The gather for DeiT at 224 pixels and 50 buckets: with its backward, and that alone."""
    ids = BucketMap.build("product", 14, 14, 1).to(device).ids
    lookup = torch.randn(batch, heads, 197, 50, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, heads, 197, 197, device=device, dtype=dtype)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reference": reference.gather,
        "gather": irpe_gather,
    }
    if released is not None and dtype != torch.bfloat16:
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


def attention(
    device: str, dtype: torch.dtype, batch: int, heads: int, side: int, encoding: str
) -> Iterator[Comparison]:
    """The op on side x side patches and a class token, head_dim 64: forward, backward, both.

    Ratios are to PyTorch's attention without relative position. `floor` copies as many bytes as
    any kernel must move: inputs read once, results written once.
    """
    torch.compiler.reset()  # FlexAttention compiles for each shape, up to a limit
    length = side**2 + 1
    inputs = random_inputs(device, dtype, (batch, heads, length, 64), side, ENCODINGS[encoding])
    terms = (inputs.rpe_q, inputs.rpe_k, inputs.rpe_v)
    leaves = [inputs.q, inputs.k, inputs.v, *(table for of in terms for table, _ in of)]
    grad = torch.randn_like(inputs.q)
    key = DispatchKey.of(device, dtype, 64, *terms, has_dropout=False)
    functions = dict(_plain_attention(device))
    baselines = tuple(functions)
    if not inputs.rpe_v:
        functions["SDPA, tensor of biases"] = _biased
    for name, row in dispatch.IMPLEMENTATIONS.items():
        if dispatch.unsupported_reason(name, key) is None:
            functions[name] = row.attention

    def both(function: Callable[[Inputs], Tensor]) -> None:
        torch.autograd.grad(function(inputs), leaves, grad, allow_unused=True)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)

    title = f"attention, {encoding}, B H L = {batch} {heads} {length}, {_name(dtype)}"
    moved = inputs.q.numel() * inputs.q.element_size()
    for part, tensors in (("forward", 4), ("backward", 8), ("forward + backward", 12)):
        if part == "forward":
            calls: Calls = {n: partial(function, inputs) for n, function in functions.items()}
        elif part == "backward":
            calls = {n: partial(backward, f(inputs)) for n, f in functions.items()}
        else:
            calls = {n: partial(both, function) for n, function in functions.items()}
        source = torch.empty(tensors * moved // 2, dtype=torch.uint8, device=device)
        calls["floor"] = partial(torch.empty_like(source).copy_, source)
        yield f"{title}, {part}", calls, baselines


def random_inputs(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], side: int, rpe: RPEConfig
) -> Inputs:
    """Random inputs, strided like the output of a QKV projection."""
    batch, heads, length, dim = shape
    qkv = torch.randn(3, batch, length, heads, dim, device=device, dtype=dtype)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in qkv)
    maps = tuple(buckets.to(device) for buckets in build_maps(rpe, side, side, 1))

    def terms(target: str) -> Any:
        if target not in rpe.on:
            return ()
        table = build_table(rpe, target, maps, heads, dim).to(device, dtype)
        for parameter in table.parameters():
            nn.init.normal_(parameter, std=0.1)
        return table.terms()

    return Inputs(q, k, v, terms("q"), terms("k"), terms("v"), dim**-0.5, 0.0, None)


def _plain_attention(device: str) -> Iterator[tuple[str, Callable[[Inputs], Tensor]]]:
    def plain(x: Inputs, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x.q, x.k, x.v)

    yield "SDPA, flash", partial(plain, backend=SDPBackend.FLASH_ATTENTION)
    if device == "cuda":
        yield "SDPA, cuDNN", partial(plain, backend=SDPBackend.CUDNN_ATTENTION)


def _biased(x: Inputs) -> Tensor:
    """All terms on queries and keys as one attn_mask (B, H, L, L), which SDPA adds to scores."""
    bias: Any = 0
    for table, buckets in x.rpe_k:
        bias = bias + irpe_gather(lookup_of(x.q, table, x.scale), buckets.ids)
    for table, buckets in x.rpe_q:
        lookup = lookup_of(x.k, table, x.scale)
        bias = bias + irpe_gather(lookup, buckets.ids, columns=True)
    return F.scaled_dot_product_attention(x.q, x.k, x.v, bias, scale=x.scale)


def training_step(
    device: str, dtype: torch.dtype, model: str, batch: int, *, compiled: bool
) -> Comparison:
    """Forward and backward of a DeiT, no optimizer: plain, and with RPE on k, qk and qkv."""
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)

    def train(network: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        network.zero_grad(set_to_none=True)
        call(images).sum().backward()

    networks = {f"plain, {name}": network for name, network in _plain(model)}
    for on in ("K", "QK", "QKV"):
        for impl in dispatch.IMPLEMENTATIONS:
            network: Any = equip(timm.create_model(model), ENCODINGS[on], impl)
            key = network.blocks[0].attn.dispatch_key(device, dtype)
            if dispatch.unsupported_reason(impl, key) is None:
                networks[f"{on}, {impl}"] = network
    calls: Calls = {}
    for name, network in networks.items():
        network.to(device, dtype).train()
        calls[name] = partial(train, network, network)
        if compiled and not name.endswith("upstream"):
            calls[f"{name}, compiled"] = partial(train, network, torch.compile(network))
    baselines = tuple(name for name in calls if name.startswith("plain"))
    title = f"{model}, forward + backward, batch {batch}, {_name(dtype)}"
    return title, calls, baselines


def _plain(model: str) -> Iterator[tuple[str, nn.Module]]:
    for name in ("fused", "eager"):
        network: Any = timm.create_model(model)
        for block in network.blocks:
            block.attn.fused_attn = name == "fused"
        yield name, network


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
