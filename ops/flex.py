"""Attention with relative position as a score_mod of PyTorch's FlexAttention.

FlexAttention generates a fused kernel around a function of one score. It serves here as a baseline:
what one gets without writing a kernel. The lookups, (B, H, L, N), are made before; the score_mod
reads them as `irpe_gather` does. What it cannot do:

- RPE on values, and dropout: a score_mod sees scores, never the weights
- gradients with the same bits in every run: those of the lookups are summed by atomics, in float32
- training on the CPU: PyTorch refuses it; here the unfused version runs there, for the tests

A length that is no multiple of 128, as those of ViTs, costs bounds checks at every score.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from irpe_ds.errors import ConfigError
from irpe_ds.ops.gather import lookup_of
from irpe_ds.ops.inputs import Case, Inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_HEAD_DIM = 16


def obstacle(case: Case) -> str | None:
    """Why FlexAttention does not take a case; None when it does."""
    if any(term.target == "v" for term in case.terms):
        return "it takes terms on queries and keys, not on values"
    if case.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {case.dtype}".replace("torch.", "")
    if case.head_dim < LEAST_HEAD_DIM:
        return f"it takes at least {LEAST_HEAD_DIM} numbers per head, not {case.head_dim}"
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, once differentiable.

    On CUDA every kind of call is compiled when it is first met: shapes, masked or not, with or
    without gradients. Beyond torch._dynamo's limit, 8 of them, it raises.

    Raises:
        ConfigError: dropout.
    """
    if x.dropout_p:
        raise ConfigError(
            "impl", "an implementation with dropout", "'flex': FlexAttention has none"
        )
    # One lookup per term: FlexAttention has no gradient for a tensor that is indexed twice.
    rows = [(lookup_of(x.q, table, x.scale), buckets.ids) for table, buckets in x.rpe_k]
    columns = [(lookup_of(x.k, table, x.scale), buckets.ids) for table, buckets in x.rpe_q]
    hidden_BL = x.key_padding_mask

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for lookup_BHLN, ids in rows:
            score = score + lookup_BHLN[b, h, i, ids[i, j]]
        for lookup_BHLN, ids in columns:
            score = score + lookup_BHLN[b, h, j, ids[j, i]]
        if hidden_BL is not None:  # a row without a key comes out as zero
            score = torch.where(hidden_BL[b, j], float("-inf"), score)
        return score

    attend: Callable[..., Tensor] = flex_attention
    if x.q.is_cuda and not torch.compiler.is_compiling():  # else it joins the graph being made
        attend = _compiled()
    return attend(x.q, x.k, x.v, score_mod=score_mod, scale=x.scale)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention with its kernels; it raises rather than run without them."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
