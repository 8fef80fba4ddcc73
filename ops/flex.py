"""Attention with relative position as a score_mod of PyTorch's FlexAttention.

FlexAttention generates a fused kernel around a function of one score. It is a baseline here: what
one gets without writing a kernel. The lookups, (B, H, L, N), are computed first; the score_mod
reads them as `irpe_gather` does. Limitations:

- no RPE on values and no dropout: a score_mod sees scores, never the attention weights
- gradients are not deterministic: those of the lookups are summed by atomics, in float32
- no training on the CPU: PyTorch refuses it; the tests run its unfused version there

A length that is not a multiple of 128, as in ViTs, costs a bounds check at every score.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops.gather import lookup_of
from irpe_ds.ops.inputs import DispatchKey, Inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM = 16


def unsupported_reason(key: DispatchKey) -> str | None:
    """Why FlexAttention cannot run such a call; None when it can."""
    if any(term.target == "v" for term in key.terms):
        return "it supports RPE on queries and keys, not on values"
    if key.dtype not in DTYPES:
        return f"dtype must be float32, float16 or bfloat16, got {key.dtype}".replace("torch.", "")
    if key.head_dim < MIN_HEAD_DIM:
        return f"head_dim must be at least {MIN_HEAD_DIM}, got {key.head_dim}"
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, once differentiable.

    On CUDA each kind of call (shapes, masked or not, with or without gradients) is compiled at its
    first use. Beyond torch._dynamo's limit of 8 kinds it raises.

    Raises:
        ConfigError: dropout.
    """
    if x.dropout_p:
        raise ConfigError(
            "impl", "an implementation with dropout", "'flex': FlexAttention has none"
        )
    # One lookup per term: in torch 2.6 to 2.14 FlexAttention has no gradient for a tensor that is
    # indexed twice (test_one_table_in_several_terms).
    rows = [(lookup_of(x.q, table, x.scale), buckets.ids) for table, buckets in x.rpe_k]
    columns = [(lookup_of(x.k, table, x.scale), buckets.ids) for table, buckets in x.rpe_q]
    mask_BL = x.key_padding_mask

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for lookup_BHLN, ids in rows:
            score = score + lookup_BHLN[b, h, i, ids[i, j]]
        for lookup_BHLN, ids in columns:
            score = score + lookup_BHLN[b, h, j, ids[j, i]]
        if mask_BL is not None:  # FlexAttention returns zero where no key is left
            score = torch.where(mask_BL[b, j], float("-inf"), score)
        return score

    # Here, since it imports sympy: 0.7 s of the start of everything that imports the operators.
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Tensor] = flex_attention
    if x.q.is_cuda and not torch.compiler.is_compiling():  # else it joins the graph being traced
        attend = _compiled()
    return attend(x.q, x.k, x.v, score_mod=score_mod, scale=x.scale)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention compiled to its kernels; raises where it cannot be."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
