"""The building block, a compiled op: reading a lookup by bucket ids, and its adjoint.

Shape suffixes: B batch, H heads, Q queries, K keys, N buckets, L tokens where Q = K, D head
dimension. `csrc/` holds the kernels; nothing is compiled before the first call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops.build import library
from irpe_ds.ops.inputs import Inputs
from irpe_ds.ops.tracing import traced_as_constant


def irpe_gather(lookup: Tensor, ids: Tensor, *, columns: bool = False) -> Tensor:
    """The lookup of every pair; replaces `rpe_index` of the released `rpe_ops`.

        rows (RPE on keys):        out[b, h, i, j] = lookup[b, h, i, ids[i, j]]
        columns (RPE on queries):  out[b, h, i, j] = lookup[b, h, j, ids[j, i]]

    Args:
        lookup: (B, H, Q, N) float64, float32, float16 or bfloat16 on CPU or CUDA, any strides;
            for columns it belongs to the keys, (B, H, K, N).
        ids: (Q, K) integers in [0, N) on the same device; for columns (K, Q).

    Returns:
        (B, H, Q, K) in the dtype of lookup, under autocast too. Its gradient is `bucket_sum`,
        summed in float32 (float64 for float64) and deterministic.

    Raises:
        ConfigError: the op cannot be built here; ids are not integers, or on another device.
        ValueError, IndexError: a wrong shape or dtype; an id out of range. On CUDA such an id
            stops the kernel, as in PyTorch's own indexing.
    """
    return _ops(lookup).gather(lookup, _int32(ids, lookup), columns)


def bucket_sum(x: Tensor, ids: Tensor, num_buckets: int, *, columns: bool = False) -> Tensor:
    """The adjoint of `irpe_gather`: sums over the pairs of a token that share a bucket.

        rows:     out[b, h, i, n] = sum of x[b, h, i, j] over the keys j with ids[i, j] = n
        columns:  out[b, h, j, n] = sum of x[b, h, i, j] over the queries i with ids[j, i] = n

    Applied to attention probabilities, it reduces RPE on values to one small product. Arguments,
    dtypes and errors as in `irpe_gather`: x is (B, H, Q, K), the result
    (B, H, Q or K, num_buckets).
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
        mask_B11L = x.key_padding_mask[:, None, None]
        scores_BHLL = scores_BHLL.masked_fill(mask_B11L, torch.finfo(q.dtype).min)
        probs_BHLL = scores_BHLL.softmax(-1).masked_fill(mask_B11L.all(-1, keepdim=True), 0.0)
    probs_BHLL = F.dropout(probs_BHLL, x.dropout_p)
    out_BHLD = probs_BHLL @ x.v
    for table_HND, buckets in x.rpe_v:
        out_BHLD = out_BHLD + bucket_sum(probs_BHLL, buckets.ids, buckets.num_buckets) @ table_HND
    return out_BHLD


def lookup_of(x_BHLD: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """A term's score for every bucket, (B, H, L, N): scale x_i . T[:, n], or T[n] of a bias table.

    A bias table (H or 1, N) is expanded, not copied.
    """
    if table.dim() == 2:
        return table[None, :, None].expand(*x_BHLD.shape[:3], -1)
    return x_BHLD @ (table if scale == 1 else table * scale)


def _ops(x: Tensor) -> Any:
    reason = _unavailable_reason(x.device.type)
    if reason is not None:
        expected = "one that the iRPE operators run on"
        raise ConfigError("device", expected, f"{x.device.type}: {reason}")
    return torch.ops.irpe_ds


@traced_as_constant
def _unavailable_reason(device_type: str) -> str | None:
    return library.unavailable_reason(device_type)


def _int32(ids: Tensor, x: Tensor) -> Tensor:
    not_integer = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if not_integer or ids.device != x.device:
        raise ConfigError("ids", f"integers on {x.device}", f"{ids.dtype} on {ids.device}")
    if ids.dtype in (
        torch.int64,
        torch.uint64,
        torch.uint32,
    ):  # an id out of range stays out of range
        ids = ids.long().clamp(-1, torch.iinfo(torch.int32).max)
    return ids.int()
