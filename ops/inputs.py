"""What every implementation of the attention op takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ds.rpe.tables import Term

Terms = tuple[Term, ...]


class Inputs(NamedTuple):
    """The arguments of `irpe_attention`, which has checked them and brought them to one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    rpe_q: Terms
    rpe_k: Terms
    rpe_v: Terms
    scale: float
    dropout_p: float
    key_padding_mask: Tensor | None


class TermKind(NamedTuple):
    """Of one term: what an implementation may ask of it."""

    target: str
    """q, k or v."""
    method: str
    """Of its BucketMap."""
    num_used: int
    """Buckets that occur on the grid."""
    is_bias: bool


class Case(NamedTuple):
    """What decides which implementation runs: everything but the sizes of a batch."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    terms: tuple[TermKind, ...]


def kinds_of(rpe_q: Terms, rpe_k: Terms, rpe_v: Terms) -> tuple[TermKind, ...]:
    """The terms of a `Case`."""
    return tuple(
        TermKind(target, buckets.method, len(buckets.used), table.dim() == 2)
        for target, terms in zip("qkv", (rpe_q, rpe_k, rpe_v), strict=True)
        for table, buckets in terms
    )
