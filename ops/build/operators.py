"""Shapes and gradients of the compiled operators `torch.ops.irpe_ds`.

B images, H heads, Q queries, K keys, N buckets.
"""

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def register() -> None:
    """Register them with PyTorch, once the operators are loaded."""
    library = torch.library
    for function in (gather, bucket_sum, softmax_, softmax_backward):
        library.register_fake(f"irpe_ds::{function.__name__}", function)
    for name, backward, setup in (
        ("gather", _gather_backward, _setup_gather),
        ("bucket_sum", _bucket_sum_backward, _setup_bucket_sum),
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
