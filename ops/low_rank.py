"""Attention with the `cross` method inside PyTorch's scaled_dot_product_attention.

A cross term asks in which line of the grid a key lies, a row or a column, and nothing else. So its
score is an inner product, and longer queries and keys carry it, here with one term on keys:

    lookup[i, b(i,j)] = sum_g A[i,g] M[j,g]            for all pairs i, j
    S[i,j] = [scale q_i | A[i]] . [k_j | M[j]]

A[i,g] is the lookup of query i in the bucket of line g, and M[j,g] is 1 where key j lies in line g.
Skip tokens, which share a bucket, are one more line. A term on queries puts M beside q and A beside
k. 14 x 14 patches and D = 64 give 96 numbers per head for terms on keys, 128 for terms on keys and
queries. It is a baseline: what PyTorch's own fused kernels make of `cross`; not timed on a GPU yet.

Shape suffixes: B batch, H heads (or 1), L tokens, D head dimension, N buckets, G lines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ds.ops.gather import irpe_gather, lookup_of
from irpe_ds.ops.inputs import Case, Inputs
from irpe_ds.rpe.buckets import BucketMap

METHODS = ("cross_rows", "cross_cols")
MULTIPLE = 8
"""Of a head dimension, which the fused backends of PyTorch ask for."""


def obstacle(case: Case) -> str | None:
    """Why a case is no product of a longer head dimension; None when it is."""
    for term in case.terms:
        if term.target == "v":
            return "it takes terms on queries and keys, not on values"
        if term.method not in METHODS:
            return f"it takes the method cross, not {term.method}"
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it; PyTorch chooses the backend."""
    batch, heads, length, head_dim = x.q.shape
    q = x.q * x.scale
    of_queries, of_keys = [q], [x.k]
    for table, buckets in x.rpe_k:
        of_queries.append(irpe_gather(lookup_of(q, table), _line_ids(buckets)))
        of_keys.append(_members(buckets, q.dtype))
    for table, buckets in x.rpe_q:
        of_queries.append(_members(buckets, q.dtype))
        of_keys.append(irpe_gather(lookup_of(x.k, table, x.scale), _line_ids(buckets)))
    padding = -sum(part.shape[-1] for part in of_keys) % MULTIPLE
    zeros = q.new_zeros(length, padding)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([p.expand(batch, heads, -1, -1) for p in (*parts, zeros)], -1)

    q, k = joined(of_queries), joined(of_keys)
    # Flash attention takes only values of the same length, so zeros follow them. It keeps no (L, L)
    # scores, which is the reason: on the CPU it is no faster than PyTorch's unfused attention.
    v = F.pad(x.v, (0, k.shape[-1] - head_dim))
    if x.key_padding_mask is None:
        out = F.scaled_dot_product_attention(q, k, v, None, x.dropout_p, scale=1.0)
        return out[..., :head_dim]
    empty_B1 = x.key_padding_mask.all(1, keepdim=True)  # no key left: zero, whatever the backend
    kept_B11L = (~x.key_padding_mask | empty_B1)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, kept_B11L, x.dropout_p, scale=1.0)
    return out[..., :head_dim].masked_fill(empty_B1[..., None, None], 0.0)


def _line_ids(buckets: BucketMap) -> Tensor:
    """(L, G) bucket of every query in every line, read off one key of each line."""
    width, skip = buckets.grid[1], buckets.skip
    first = (
        slice(skip, None, width) if buckets.method == "cross_rows" else slice(skip, skip + width)
    )
    return torch.cat([buckets.ids[:, :1], buckets.ids[:, first]], 1)


def _members(buckets: BucketMap, dtype: torch.dtype) -> Tensor:
    """(L, G) ones where a token lies in a line; line 0 has the skip tokens."""
    (height, width), skip = buckets.grid, buckets.skip
    axis, lines = (0, height) if buckets.method == "cross_rows" else (1, width)
    members = buckets.ids.new_zeros(len(buckets.ids), 1 + lines, dtype=dtype)
    members[:skip, 0] = 1
    members[skip:, 1:].unflatten(0, (height, width)).diagonal(dim1=axis, dim2=2).fill_(1)
    return members
