"""Attention with relative position in fused CUDA kernels: no (L, L) tensor leaves the chip.

`csrc/cuda/attention_forward.cu` and `attention_backward.cu` hold the kernels. What stays between
forward and backward is the output and the log-sum-exp of the scores, (B, H, L) float32.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops.inputs import Case, Inputs
from irpe_ds.rpe.buckets import BucketMap

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64)
MOST_TERMS = 2
MOST_BUCKETS = 128
"""On queries, keys or values each; more would leave no room in a multiprocessor's shared memory."""


def obstacle(case: Case) -> str | None:
    """Why the kernels do not take a case; None when they do."""
    if case.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {case.dtype}".replace("torch.", "")
    if case.head_dim not in HEAD_DIMS:
        return f"it takes 32 or 64 numbers per head, not {case.head_dim}"
    for target in "qkv":
        used = [term.num_used for term in case.terms if term.target == target]
        if len(used) > MOST_TERMS or sum(used) > MOST_BUCKETS:
            most = f"{MOST_TERMS} terms with {MOST_BUCKETS} buckets in use"
            return f"it takes at most {most} on {target}, not {len(used)} with {sum(used)}"
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, once differentiable.

    Sums are kept in float32; lookups and bucket sums are rounded to the dtype of q.
    """
    terms = [
        (_used(table, buckets, dim=-2 if target == 2 else -1), buckets.tiles, target)
        for target, of_target in enumerate((x.rpe_q, x.rpe_k, x.rpe_v))
        for table, buckets in of_target
    ]
    tables, tiles, targets = ([term[n] for term in terms] for n in range(3))
    seed = torch.randint(2**63 - 1, (1,), device=x.q.device) if x.dropout_p else None
    mask = None if x.key_padding_mask is None else x.key_padding_mask.contiguous()
    skip = min([buckets.skip for _, buckets in x.rpe_k]) if x.rpe_k else 0
    options = (mask, seed, x.scale, x.dropout_p, skip)
    out, _ = torch.ops.irpe_ds.attention_forward(x.q, x.k, x.v, tables, tiles, targets, *options)
    return out


def _used(table: Tensor, buckets: BucketMap, dim: int) -> Tensor:
    """The entries of a table that occur on the grid."""
    every = len(buckets.used) == buckets.num_buckets
    return table if every else table.index_select(dim, buckets.used)


@functools.cache
def register() -> None:
    """Tell PyTorch the shapes and the gradients of these operators, once they are loaded."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, tables, tiles, ctx.targets, mask, seed, *ctx.numbers = inputs
        ctx.num_terms = len(tables)
        ctx.save_for_backward(*output, q, k, v, mask, seed, *tables, *tiles)

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            expected = "an implementation with second derivatives, 'gather' or 'reference'"
            raise ConfigError("impl", expected, "'fused' under create_graph=True")
        out, lse, q, k, v, mask, seed, *rest = ctx.saved_tensors
        tables, tiles = rest[: ctx.num_terms], rest[ctx.num_terms :]
        options = (ctx.targets, mask, seed, *ctx.numbers)
        grads = torch.ops.irpe_ds.attention_backward(
            grad, out, lse, q, k, v, tables, tiles, *options
        )
        targets: Any = None if ctx.num_terms else []  # an empty int[] counts as tensors
        no_grads = [None] * ctx.num_terms, targets, None, None, None, None, None
        return *grads[:3], grads[3:], *no_grads

    def fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def fake_backward(
        grad: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: list[Tensor],
        *_: Any,
    ) -> list[Tensor]:
        of_tables = [torch.empty_like(table) for table in tables]
        return [*(_like_tokens(x) for x in (q, k, v)), *of_tables]

    torch.library.register_fake("irpe_ds::attention_forward", fake_forward)
    torch.library.register_fake("irpe_ds::attention_backward", fake_backward)
    torch.library.register_autograd("irpe_ds::attention_forward", backward, setup_context=setup)


def _like_tokens(x: Tensor) -> Tensor:
    """An empty (B, H, L, D) whose memory is (B, L, H, D)."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)
