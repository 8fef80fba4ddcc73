"""The arguments of every implementation, and the key by which one is chosen."""

from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ds.rpe.tables import Term

Terms = tuple[Term, ...]


class Inputs(NamedTuple):
    """The arguments of `irpe_attention`, checked and in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    rpe_q: Terms
    rpe_k: Terms
    rpe_v: Terms
    scale: float
    dropout_p: float
    key_padding_mask: Tensor | None


class TermSpec(NamedTuple):
    """The properties of one term that an implementation may depend on."""

    target: str
    """q, k or v."""
    # Those of its BucketMap.
    method: str
    grid: tuple[int, int]
    skip: int
    ratio: float
    is_bias: bool


class DispatchKey(NamedTuple):
    """Everything that the choice of an implementation depends on; sizes of a batch are not."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    terms: tuple[TermSpec, ...]
    has_dropout: bool = False

    @classmethod
    def of(
        cls,
        device_type: str,
        dtype: torch.dtype,
        head_dim: int,
        rpe_q: Terms,
        rpe_k: Terms,
        rpe_v: Terms,
        has_dropout: bool,
    ) -> "DispatchKey":
        """The key of a call with these terms."""
        terms = tuple(
            TermSpec(
                target, buckets.method, buckets.grid, buckets.skip, buckets.ratio, table.dim() == 2
            )
            for target, terms in zip("qkv", (rpe_q, rpe_k, rpe_v), strict=True)
            for table, buckets in terms
        )
        return cls(device_type, dtype, head_dim, terms, has_dropout)
