"""Eager attention with relative position: the definition that every kernel is tested against.

Shape suffixes: B batch, H heads (or 1), L tokens, D head dimension, N buckets.
"""

import torch.nn.functional as F
from torch import Tensor

from irpe_ds.ops.inputs import Inputs


def attention(x: Inputs) -> Tensor:
    """Sec. 3 and 4 of iRPE, with b(i, j) the bucket of query i against key j.

        S[i,j] = scale q_i . k_j  +  scale q_i . T_K[:, b(i,j)]  +  scale k_j . T_Q[:, b(j,i)]
        P = softmax(S);   O[i] = sum_j P[i,j] (v_j + T_V[b(i,j)])

    In bias mode a term is T[b] itself. Any floating dtype, float64 included; the result is that of
    `irpe_attention`.
    """
    q_BHLD = x.q * x.scale
    scores_BHLL = q_BHLD @ x.k.transpose(-2, -1)
    for table, buckets in x.rpe_k:
        scores_BHLL = scores_BHLL + _scores(q_BHLD, table, buckets.ids)
    for table, buckets in x.rpe_q:
        scores_BHLL = scores_BHLL + _scores(x.k * x.scale, table, buckets.ids).transpose(-2, -1)
    if x.key_padding_mask is None:
        probs_BHLL = scores_BHLL.softmax(-1)
    else:
        empty_B1 = x.key_padding_mask.all(1, keepdim=True)  # no key left: zero, not 0 / 0
        mask_BL = x.key_padding_mask & ~empty_B1
        probs_BHLL = scores_BHLL.masked_fill(mask_BL[:, None, None], float("-inf")).softmax(-1)
        probs_BHLL = probs_BHLL.masked_fill(empty_B1[:, None, None], 0.0)
    probs_BHLL = F.dropout(probs_BHLL, x.dropout_p)
    out_BHLD = probs_BHLL @ x.v
    for table_HND, buckets in x.rpe_v:
        out_BHLD = out_BHLD + bucket_sum(probs_BHLL, buckets.ids, buckets.num_buckets) @ table_HND
    return out_BHLD


def _scores(x_BHLD: Tensor, table: Tensor, ids_LL: Tensor) -> Tensor:
    """One term of every pair: x_i . T[:, b(i,j)], or T[b(i,j)] for a bias table (H, N)."""
    if table.dim() == 2:
        return table[:, ids_LL]
    return gather(x_BHLD @ table, ids_LL)


def gather(lookup_BHLN: Tensor, ids_LL: Tensor) -> Tensor:
    """out[b, h, i, j] = lookup[b, h, i, ids[i, j]], (B, H, L, L)."""
    return lookup_BHLN.gather(-1, ids_LL.long().expand(*lookup_BHLN.shape[:2], -1, -1))


def bucket_sum(probs_BHLL: Tensor, ids_LL: Tensor, num_buckets: int) -> Tensor:
    """out[b, h, i, n] = sum of probs[b, h, i, j] over the keys j in bucket n, (B, H, L, N).

    It reduces RPE on values to one small product, without an (L, L, D) expansion of the table.
    """
    sums_BHLN = probs_BHLL.new_zeros(*probs_BHLL.shape[:3], num_buckets)
    return sums_BHLN.scatter_add(-1, ids_LL.long().expand_as(probs_BHLL), probs_BHLL)
