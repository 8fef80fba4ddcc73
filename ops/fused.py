"""Attention with relative position in fused CUDA kernels: no (L, L) tensor leaves the chip.

`csrc/cuda/attention_forward.cu` and `attention_backward.cu` hold the kernels. Saved for the
backward pass: the inputs, the output, and the log-sum-exp of the scores, (B, H, L) float32.
"""

import torch
from torch import Tensor

from irpe_ds.ops.inputs import DispatchKey, Inputs
from irpe_ds.ops.packed_ids import packed_ids
from irpe_ds.rpe.buckets import BucketMap

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64)
MAX_TERMS = 2
MAX_BUCKETS = 128
"""For each of queries, keys and values; more would not fit into shared memory."""


def unsupported_reason(key: DispatchKey) -> str | None:
    """Why the kernels cannot run such a call; None when they can."""
    if key.dtype not in DTYPES:
        return f"dtype must be float16 or bfloat16, got {key.dtype}".replace("torch.", "")
    if key.head_dim not in HEAD_DIMS:
        return f"head_dim must be 32 or 64, got {key.head_dim}"
    for target in "qkv":
        used = [term.num_used for term in key.terms if term.target == target]
        if len(used) > MAX_TERMS or sum(used) > MAX_BUCKETS:
            limit = f"at most {MAX_TERMS} terms with {MAX_BUCKETS} used buckets"
            return f"rpe_{target} must have {limit}, got {len(used)} with {sum(used)}"
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, once differentiable.

    Sums are accumulated in float32; lookups and bucket sums are rounded to the dtype of q.
    """
    terms = [
        (_used(table, buckets, dim=-2 if target == 2 else -1), packed_ids(buckets), target)
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
    """The entries of a table whose buckets occur on the grid."""
    all_used = len(buckets.used_ids) == buckets.num_buckets
    return table if all_used else table.index_select(dim, buckets.used_ids)
