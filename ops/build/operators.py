"""Shapes and gradients of the compiled operators `torch.ops.irpe_ds`.

B images, H heads, Q queries, K keys, N buckets, L tokens where Q = K, D head dimension.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError


@functools.cache
def register() -> None:
    """Register them with PyTorch, once the operators are loaded."""
    library = torch.library
    for function in (
        gather,
        bucket_sum,
        softmax_,
        softmax_backward,
        attention_forward,
        attention_backward,
    ):
        library.register_fake(f"irpe_ds::{function.__name__}", function)
    for name, backward, setup in (
        ("gather", _gather_backward, _setup_gather),
        ("bucket_sum", _bucket_sum_backward, _setup_bucket_sum),
        ("attention_forward", _attention_backward, _setup_attention),
    ):
        library.register_autograd(f"irpe_ds::{name}", backward, setup_context=setup)


def gather(lookup: Tensor, ids: Tensor, columns: bool = False) -> Tensor:
    """(B, H, Q, K)."""
    rows, others = ids.shape
    pairs = (others, rows) if columns else (rows, others)
    return lookup.new_empty(*lookup.shape[:2], *pairs)


def bucket_sum(x: Tensor, ids: Tensor, num_buckets: int, columns: bool = False) -> Tensor:
    """(B, H, Q or K, N)."""
    return x.new_empty(*x.shape[:2], ids.shape[0], num_buckets)


def softmax_(scores: Tensor, lookups: list[Tensor], ids: list[Tensor], num_rows: int) -> None:
    """In place."""


def softmax_backward(
    grad: Tensor, probs: Tensor, ids: list[Tensor], num_buckets: list[int], num_rows: int
) -> list[Tensor]:
    """Gradients of the scores (B, H, Q, K) and of every lookup (B, H, Q or K, N)."""
    sums = [
        probs.new_empty(*probs.shape[:2], each.shape[0], n)
        for each, n in zip(ids, num_buckets, strict=True)
    ]
    return [torch.empty_like(probs, memory_format=torch.contiguous_format), *sums]


def attention_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D), and log-sum-exp of the scores (B, H, L) in float32."""
    return _like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    *_: Any,
) -> list[Tensor]:
    """Gradients of q, k, v and of every table."""
    return [*(_like_tokens(x) for x in (q, k, v)), *(torch.empty_like(t) for t in tables)]


def _like_tokens(x: Tensor) -> Tensor:
    """An empty (B, H, L, D) whose memory is (B, L, H, D)."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lookup, ids, ctx.columns = inputs
    ctx.save_for_backward(ids)
    ctx.num_buckets = lookup.shape[-1]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (ids,) = ctx.saved_tensors
    sums = torch.ops.irpe_ds.bucket_sum(grad, ids, ctx.num_buckets, ctx.columns)
    return sums, None, None


def _setup_bucket_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.columns = inputs
    ctx.save_for_backward(ids)


def _bucket_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (ids,) = ctx.saved_tensors
    return torch.ops.irpe_ds.gather(grad, ids, ctx.columns), None, None, None


def _setup_attention(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, tables, tiles, ctx.targets, mask, seed, *ctx.numbers = inputs
    ctx.num_terms = len(tables)
    ctx.save_for_backward(*output, q, k, v, mask, seed, *tables, *tiles)


def _attention_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        expected = "an implementation with second derivatives, 'gather' or 'reference'"
        raise ConfigError("impl", expected, "'fused' under create_graph=True")
    out, lse, q, k, v, mask, seed, *rest = ctx.saved_tensors
    tables, tiles = rest[: ctx.num_terms], rest[ctx.num_terms :]
    options = (ctx.targets, mask, seed, *ctx.numbers)
    grads = torch.ops.irpe_ds.attention_backward(grad, out, lse, q, k, v, tables, tiles, *options)
    # torch 2.6 to 2.14 takes an empty int[] for a list of tensors, and asks for as many gradients.
    targets: Any = None if ctx.num_terms else []
    return *grads[:3], grads[3:], [None] * ctx.num_terms, targets, None, None, None, None, None
