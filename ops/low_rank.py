"""Attention with the `cross` method inside PyTorch's scaled_dot_product_attention.

A cross term depends only on which line of the grid, a row or a column, a key lies in. So its score
is an inner product, and longer queries and keys carry it. With one term on keys:

    lookup[i, b(i,j)] = sum_g A[i,g] M[j,g]            for all pairs i, j
    S[i,j] = [scale q_i | A[i]] . [k_j | M[j]]

A[i,g] is the lookup of query i in the bucket of line g, and M[j,g] is 1 where key j lies in line g.
Prefix tokens, which share a bucket, are one more line. A term on queries appends M to q and A to k.
14 x 14 patches and D = 64 give a head dimension of 96 for terms on keys, 128 for terms on keys and
queries. It is a baseline: `cross` by PyTorch's own fused kernels; not timed on a GPU yet.

Shape suffixes: B batch, H heads (or 1), L tokens, D head dimension, N buckets, G lines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ds.ops.gather import irpe_gather, lookup_of
from irpe_ds.ops.inputs import DispatchKey, Inputs
from irpe_ds.rpe.buckets import BucketMap

CROSS_METHODS = ("cross_rows", "cross_cols")
"""Of the two BucketMaps that the method `cross` consists of."""
HEAD_DIM_MULTIPLE = 8
"""What PyTorch's fused backends require."""


def unsupported_reason(key: DispatchKey) -> str | None:
    """Why a longer head dimension cannot express such a call; None when it can."""
    for term in key.terms:
        if term.target == "v":
            return "it supports RPE on queries and keys, not on values"
        if term.method not in CROSS_METHODS:
            return f"it supports the method cross, not {term.method}"
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it; PyTorch chooses the backend."""
    batch, heads, length, head_dim = x.q.shape
    q = x.q * x.scale
    q_parts, k_parts = [q], [x.k]
    for table, buckets in x.rpe_k:
        q_parts.append(irpe_gather(lookup_of(q, table), _line_ids(buckets)))
        k_parts.append(_members(buckets, q.dtype))
    for table, buckets in x.rpe_q:
        q_parts.append(_members(buckets, q.dtype))
        k_parts.append(irpe_gather(lookup_of(x.k, table, x.scale), _line_ids(buckets)))
    padding = -sum(part.shape[-1] for part in k_parts) % HEAD_DIM_MULTIPLE
    zeros = q.new_zeros(length, padding)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([p.expand(batch, heads, -1, -1) for p in (*parts, zeros)], -1)

    q, k = joined(q_parts), joined(k_parts)
    # Flash attention needs values of the same head dimension, so they are padded with zeros. The
    # gain is memory, no (L, L) scores: on the CPU it is no faster than unfused attention.
    v = F.pad(x.v, (0, k.shape[-1] - head_dim))
    if x.key_padding_mask is None:
        out = F.scaled_dot_product_attention(q, k, v, None, x.dropout_p, scale=1.0)
        return out[..., :head_dim]
    empty_B1 = x.key_padding_mask.all(1, keepdim=True)  # no key left: zero, on every backend
    kept_B11L = (~x.key_padding_mask | empty_B1)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, kept_B11L, x.dropout_p, scale=1.0)
    return out[..., :head_dim].masked_fill(empty_B1[..., None, None], 0.0)


def _line_ids(buckets: BucketMap) -> Tensor:
    """(L, G) bucket of every query against every line, taken from one key of each line."""
    width, skip = buckets.grid[1], buckets.skip
    first = (
        slice(skip, None, width) if buckets.method == "cross_rows" else slice(skip, skip + width)
    )
    return torch.cat([buckets.ids[:, :1], buckets.ids[:, first]], 1)


def _members(buckets: BucketMap, dtype: torch.dtype) -> Tensor:
    """(L, G), one where a token lies in a line; line 0 holds the prefix tokens."""
    (height, width), skip = buckets.grid, buckets.skip
    axis, lines = (0, height) if buckets.method == "cross_rows" else (1, width)
    members = buckets.ids.new_zeros(len(buckets.ids), 1 + lines, dtype=dtype)
    members[:skip, 0] = 1
    members[skip:, 1:].unflatten(0, (height, width)).diagonal(dim1=axis, dim2=2).fill_(1)
    return members
