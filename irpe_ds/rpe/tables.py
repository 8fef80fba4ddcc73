"""The learned tables, with the state-dict keys of the released checkpoints."""

import torch
from torch import Tensor, nn

from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig

Term = tuple[Tensor, BucketMap]
"""A table and its bucket map: one element of `rpe_q`, `rpe_k`, `rpe_v` of `irpe_attention`."""


class RPETable(nn.Module):
    """One zero-initialised table; T[..., b] is the entry of bucket b of `buckets`.

    The parameter is `lookup_table_weight`, (H or 1, D, num_buckets) for queries and keys and
    (H or 1, num_buckets, D) for values, or in bias mode `lookup_table_bias`, (H or 1, num_buckets).
    """

    def __init__(
        self,
        rpe: RPEConfig,
        target: str,
        buckets: BucketMap,
        num_heads: int,
        head_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.buckets = buckets
        self.is_bias = rpe.mode == "bias"
        heads, n = 1 if rpe.shared_heads else num_heads, buckets.num_buckets
        if self.is_bias:
            self.lookup_table_bias = nn.Parameter(torch.zeros(heads, n, device=device, dtype=dtype))
        else:
            shape = (heads, n, head_dim) if target == "v" else (heads, head_dim, n)
            self.lookup_table_weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Reset to zero, the initialisation."""
        nn.init.zeros_(self())

    def forward(self) -> Tensor:
        """The table. A forward call, because ZeRO-3 gathers parameters around forward calls."""
        return self.lookup_table_bias if self.is_bias else self.lookup_table_weight

    def terms(self) -> tuple[Term, ...]:
        """The argument rpe_q, rpe_k or rpe_v of `irpe_attention`."""
        return ((self(), self.buckets),)


class CrossRPETable(nn.Module):
    """The `cross` method: a table on row offsets plus a table on column offsets."""

    def __init__(self, rows: RPETable, cols: RPETable) -> None:
        super().__init__()
        self.rp_rows = rows
        self.rp_cols = cols

    def terms(self) -> tuple[Term, ...]:
        """The argument rpe_q, rpe_k or rpe_v of `irpe_attention`."""
        return (*self.rp_rows.terms(), *self.rp_cols.terms())


def build_maps(rpe: RPEConfig, height: int, width: int, skip: int) -> tuple[BucketMap, ...]:
    """The bucket maps of one grid: rows and columns for `cross`, else a single one."""
    methods = ("cross_rows", "cross_cols") if rpe.method == "cross" else (rpe.method,)
    return tuple(BucketMap.build(method, height, width, skip, rpe.ratio) for method in methods)


def count_buckets(maps: tuple[BucketMap, ...]) -> str:
    """How many buckets of a target's tables occur on the grid, as in "20 of 82"."""
    used, all_ = sum(len(each.used_ids) for each in maps), sum(each.num_buckets for each in maps)
    return f"{used} of {all_}"


def build_table(
    rpe: RPEConfig,
    target: str,
    maps: tuple[BucketMap, ...],
    num_heads: int,
    head_dim: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> RPETable | CrossRPETable:
    """The table or tables of one `target`, q, k or v; `maps` are those of `build_maps`."""
    tables = [
        RPETable(rpe, target, buckets, num_heads, head_dim, device, dtype) for buckets in maps
    ]
    return CrossRPETable(*tables) if rpe.method == "cross" else tables[0]
