"""The building block, as a compiled op: a lookup read by bucket ids, and its adjoint.

Shape suffixes: B batch, H heads, Q queries, K keys, N buckets, L tokens where Q = K, D head
dimension. `csrc/` holds the kernels; nothing is compiled before the first call.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops.build import library
from irpe_ds.ops.inputs import Inputs


def irpe_gather(lookup: Tensor, ids: Tensor, *, columns: bool = False) -> Tensor:
    """The lookup of every pair; takes the place of `rpe_index` in the released `rpe_ops`.

        rows (RPE on keys):        out[b, h, i, j] = lookup[b, h, i, ids[i, j]]
        columns (RPE on queries):  out[b, h, i, j] = lookup[b, h, j, ids[j, i]]

    Args:
        lookup: (B, H, Q, N) float64, float32, float16 or bfloat16 on CPU or CUDA, any strides;
            for columns it belongs to the keys, (B, H, K, N).
        ids: (Q, K) integers in [0, N) on the same device; for columns (K, Q).

    Returns:
        (B, H, Q, K) in the dtype of lookup, under autocast too. Its gradient is `bucket_sum`, with
        sums in float32 (float64 for float64), and the same bits in every run.

    Raises:
        ConfigError: the op cannot be built here; ids are no integers, or elsewhere.
        ValueError, IndexError: a shape or dtype that does not fit; an id out of range. On
            CUDA such an id stops the kernel, as PyTorch's own indexing does.
    """
    return _ops(lookup).gather(lookup, _int32(ids, lookup), columns)


def bucket_sum(x: Tensor, ids: Tensor, num_buckets: int, *, columns: bool = False) -> Tensor:
    """The adjoint of `irpe_gather`: sums over the pairs of one token that share a bucket.

        rows:     out[b, h, i, n] = sum of x[b, h, i, j] over the keys j with ids[i, j] = n
        columns:  out[b, h, j, n] = sum of x[b, h, i, j] over the queries i with ids[j, i] = n

    Of the attention probabilities it gives RPE on values as one small product. Arguments, dtypes
    and errors as in `irpe_gather`: x is (B, H, Q, K), the result (B, H, Q or K, num_buckets).
    """
    return _ops(x).bucket_sum(x, _int32(ids, x), num_buckets, columns)


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, from PyTorch's operators and these two."""
    q, k = x.q * x.scale, x.k
    scores_BHLL = q @ k.mT
    for table, buckets in x.rpe_k:
        scores_BHLL = scores_BHLL + irpe_gather(lookup_of(q, table), buckets.ids)
    for table, buckets in x.rpe_q:
        lookup_BHLN = lookup_of(k, table, x.scale)
        scores_BHLL = scores_BHLL + irpe_gather(lookup_BHLN, buckets.ids, columns=True)
    if x.key_padding_mask is None:
        probs_BHLL = scores_BHLL.softmax(-1)
    else:
        hidden_B11L = x.key_padding_mask[:, None, None]
        scores_BHLL = scores_BHLL.masked_fill(hidden_B11L, torch.finfo(q.dtype).min)
        probs_BHLL = scores_BHLL.softmax(-1).masked_fill(hidden_B11L.all(-1, keepdim=True), 0.0)
    probs_BHLL = F.dropout(probs_BHLL, x.dropout_p)
    out_BHLD = probs_BHLL @ x.v
    for table_HND, buckets in x.rpe_v:
        out_BHLD = out_BHLD + bucket_sum(probs_BHLL, buckets.ids, buckets.num_buckets) @ table_HND
    return out_BHLD


def lookup_of(x_BHLD: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """A term's score in every bucket, (B, H, L, N): scale x_i . T[:, n], or T[n] of a bias table.

    A bias table (H or 1, N) is expanded, not copied.
    """
    if table.dim() == 2:
        return table[None, :, None].expand(*x_BHLD.shape[:3], -1)
    return x_BHLD @ (table if scale == 1 else table * scale)


def _ops(x: Tensor) -> Any:
    library.require(x.device.type)
    return torch.ops.irpe_ds


def _int32(ids: Tensor, x: Tensor) -> Tensor:
    no_integers = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if no_integers or ids.device != x.device:
        raise ConfigError("ids", f"integers on {x.device}", f"{ids.dtype} on {ids.device}")
    if ids.dtype in (torch.int64, torch.uint64, torch.uint32):  # out of range stays so
        ids = ids.long().clamp(-1, torch.iinfo(torch.int32).max)
    return ids.int()


@functools.cache
def register() -> None:
    """Tell PyTorch the shapes and the gradients of these operators, once they are loaded."""

    def setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lookup, ids, ctx.columns = inputs
        ctx.save_for_backward(ids)
        ctx.num_buckets = lookup.shape[-1]

    def gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        sums = torch.ops.irpe_ds.bucket_sum(grad, ids, ctx.num_buckets, ctx.columns)
        return sums, None, None

    def setup_bucket_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ids, _, ctx.columns = inputs
        ctx.save_for_backward(ids)

    def bucket_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        return torch.ops.irpe_ds.gather(grad, ids, ctx.columns), None, None, None

    def fake_gather(lookup: Tensor, ids: Tensor, columns: bool = False) -> Tensor:
        rows, others = ids.shape
        pairs = (others, rows) if columns else (rows, others)
        return lookup.new_empty(*lookup.shape[:2], *pairs)

    def fake_bucket_sum(x: Tensor, ids: Tensor, num_buckets: int, columns: bool = False) -> Tensor:
        return x.new_empty(*x.shape[:2], ids.shape[0], num_buckets)

    def fake_softmax(
        scores: Tensor, lookups: list[Tensor], ids: list[Tensor], num_rows: int
    ) -> None:
        """In place."""

    def fake_softmax_backward(
        grad: Tensor, probs: Tensor, ids: list[Tensor], num_buckets: list[int], num_rows: int
    ) -> list[Tensor]:
        sums = [
            probs.new_empty(*probs.shape[:2], each.shape[0], n)
            for each, n in zip(ids, num_buckets, strict=True)
        ]
        return [torch.empty_like(probs, memory_format=torch.contiguous_format), *sums]

    torch.library.register_fake("irpe_ds::gather", fake_gather)
    torch.library.register_fake("irpe_ds::bucket_sum", fake_bucket_sum)
    torch.library.register_fake("irpe_ds::softmax_", fake_softmax)
    torch.library.register_fake("irpe_ds::softmax_backward", fake_softmax_backward)
    torch.library.register_autograd("irpe_ds::gather", gather_backward, setup_context=setup_gather)
    torch.library.register_autograd(
        "irpe_ds::bucket_sum", bucket_sum_backward, setup_context=setup_bucket_sum
    )
