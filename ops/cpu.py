"""Attention with relative position on the CPU, in few passes over the (L, L) scores.

Gathered terms and softmax are one pass forward and one pass backward, and products accumulate
in place. Shape suffixes: B batch, H heads (or 1), L tokens, D head dimension, N buckets.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops.inputs import Inputs


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, once differentiable."""
    # The op takes terms gathered along rows first: those on keys, and biases on queries, which
    # depend on no token and so are rows of the transposed ids.
    contextual_q = [(table, buckets.ids) for table, buckets in x.rpe_q if table.dim() == 3]
    bias_q = [(table, buckets.ids.T) for table, buckets in x.rpe_q if table.dim() == 2]
    rows = [(table, buckets.ids) for table, buckets in x.rpe_k] + bias_q
    tables, ids = zip(*rows, *contextual_q, strict=True) if x.rpe_q or x.rpe_k else ((), ())
    probs = _Probabilities.apply(x.q, x.k, x.scale, x.key_padding_mask, len(rows), ids, *tables)
    probs = F.dropout(probs, x.dropout_p)
    tables, ids = zip(*((t, m.ids) for t, m in x.rpe_v), strict=True) if x.rpe_v else ((), ())
    return _WeightedValues.apply(probs, x.v, ids, *tables)


def _first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a backward in the dtype of its forward, and refuse to be differentiated again."""

    @functools.wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            expected = "an implementation with second derivatives, 'gather' or 'reference'"
            raise ConfigError("impl", expected, "'cpu' under create_graph=True")
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, grad)

    return checked


class _Probabilities(torch.autograd.Function):
    """P = softmax(scale q k^T + terms on keys + terms on queries)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: float,
        key_padding_mask: Tensor | None,
        num_rows: int,
        ids: tuple[Tensor, ...],
        *tables: Tensor,
    ) -> Tensor:
        q, k = q.contiguous(), k.contiguous()
        probs = _product(q, k.mT, scale)  # scores first; softmax_ works in place
        lookups = [
            _lookup(q if n < num_rows else k, table, scale) for n, table in enumerate(tables)
        ]
        if key_padding_mask is not None:
            mask_B11L = key_padding_mask[:, None, None]
            probs.masked_fill_(mask_B11L, float("-inf"))
        torch.ops.irpe_ds.softmax_(probs, lookups, ids, num_rows)
        if key_padding_mask is not None:  # no key left: zero, not 0 / 0
            probs.masked_fill_(mask_B11L.all(-1, keepdim=True), 0.0)
        ctx.save_for_backward(q, k, probs, *ids, *tables)
        ctx.scale, ctx.num_rows = scale, num_rows
        return probs

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, probs, *rest = ctx.saved_tensors
        ids, tables = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        buckets = [table.shape[-1] for table in tables]
        grad_scores, *grad_lookups = torch.ops.irpe_ds.softmax_backward(
            grad, probs, ids, buckets, ctx.num_rows
        )
        grad_q, grad_k = _product(grad_scores, k, ctx.scale), _product(grad_scores.mT, q, ctx.scale)
        grad_tables = []
        for n, (table, grad_lookup) in enumerate(zip(tables, grad_lookups, strict=True)):
            x, grad_x = (q, grad_q) if n < ctx.num_rows else (k, grad_k)
            if table.dim() == 3:
                _add_product(grad_x, grad_lookup, table.mT, ctx.scale)
            grad_tables.append(_table_grad(x, grad_lookup, table, ctx.scale))
        return grad_q, grad_k, None, None, None, None, *grad_tables


class _WeightedValues(torch.autograd.Function):
    """O = P v + bucket sums of P times the tables on values."""

    @staticmethod
    def forward(
        ctx: Any, probs: Tensor, v: Tensor, ids: tuple[Tensor, ...], *tables: Tensor
    ) -> Tensor:
        v = v.contiguous()
        out = _product(probs, v)
        sums = [
            torch.ops.irpe_ds.bucket_sum(probs, each, table.shape[-2])
            for each, table in zip(ids, tables, strict=True)
        ]
        for sum_, table in zip(sums, tables, strict=True):
            _add_product(out, sum_, table)
        ctx.save_for_backward(probs, v, *ids, *sums, *tables)
        return out

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probs, v, *rest = ctx.saved_tensors
        n = len(rest) // 3
        grad = grad.contiguous()
        grad_probs, grad_v = _product(grad, v.mT), _product(probs.mT, grad)
        grad_tables = []
        for ids, sums, table in zip(rest[:n], rest[n : 2 * n], rest[2 * n :], strict=True):
            grad_probs += torch.ops.irpe_ds.gather(_lookup(grad, table.mT), ids)
            grad_tables.append(_table_grad(sums, grad, table))
        return grad_probs, grad_v, None, *grad_tables


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale a b, (B, H, L, M) from (B, H, L, K) and (B, H, K, M)."""
    unread = a.new_empty(())
    out = torch.baddbmm(unread, a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale)
    return out.view(*a.shape[:3], b.shape[-1])


def _add_product(out: Tensor, x: Tensor, table: Tensor, scale: float = 1.0) -> None:
    """out += scale x T, (B, H, L, M) from (B, H, L, K) and (H or 1, K, M)."""
    if table.shape[0] == 1:
        out.flatten(0, 2).addmm_(x.flatten(0, 2), table[0], alpha=scale)
    else:
        out.add_(x @ table, alpha=scale)


def _lookup(x: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """scale x T for every token, (B, H, L, N); a bias table (H or 1, N) is the lookup itself."""
    if table.dim() == 2:
        return table[None, :, None].expand(*x.shape[:3], -1)
    scaled = table * scale
    if table.shape[0] > 1:
        return x @ scaled
    return (x.flatten(0, 2) @ scaled[0]).view(*x.shape[:3], table.shape[-1])


def _table_grad(x: Tensor, grad: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Gradient of a table, in its shape, given the gradient of its product with x."""
    if table.dim() == 2:
        per_head = grad.sum((0, 2))
        return per_head.sum(0, keepdim=True) if table.shape[0] == 1 else per_head
    if table.shape[0] == 1:
        return (x.flatten(0, 2).T @ grad.flatten(0, 2)).mul_(scale)[None]
    return (x.mT @ grad).sum(0).mul_(scale)
