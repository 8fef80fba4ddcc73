"""Bucket maps as two small classifications: what the fused kernels read in place of ids.

A map depends on the offset of two patches alone, and only through a class of its rows and a class
of its columns:

    b(i, j) = matrix[row_class[yi - yj]][column_class[xi - xj]]

With 1.9 as ratio a product map of any grid has 7 x 7 classes, an euclidean one 5 x 5. Terms of one
target are classified together, so that cross, rows plus columns, has 7 x 7 too.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from irpe_ds.rpe.buckets import BucketMap


class Factors(NamedTuple):
    """Of the maps of one target, of the same grid."""

    buckets: Tensor
    """(maps, row classes, column classes + 1) int64; the last column is the prefix tokens' bucket,
    or repeats a bucket where there are no prefix tokens."""
    row_class: Tensor
    """(2 height - 1,) uint8, by yi - yj + height - 1."""
    column_class: Tensor
    """(2 width - 1,) uint8, by xi - xj + width - 1."""


def transposed(factors: Factors) -> Factors:
    """With rows and columns in each other's places in `buckets`, the prefix tokens' bucket last."""
    buckets, last = factors.buckets[:, :, :-1].mT, factors.buckets[:, :1, -1:]
    buckets = torch.cat([buckets, last.expand(-1, buckets.shape[1], -1)], 2)
    return factors._replace(buckets=buckets)


def factor(maps: Sequence[BucketMap]) -> Factors:
    """The factors of these maps on their device, made once for each device.

    Raises:
        ValueError: the maps are of different grids or numbers of prefix tokens.
    """
    places = {(each.grid, each.skip) for each in maps}
    if len(places) != 1:
        raise ValueError(f"expected maps of one grid and number of prefix tokens, got {places}")
    keys = tuple((each.method, *each.grid, each.skip, each.ratio) for each in maps)
    return _factor_on(keys, maps[0].ids.device)


@functools.cache
def _factor_on(keys: tuple[tuple[str, int, int, int, float], ...], device: torch.device) -> Factors:
    """Never freed, so that captured CUDA graphs stay valid."""
    # Real, normal tensors whatever the first call is: see packed_ids.
    with _disable_current_modes(), torch.inference_mode(False):
        maps = [BucketMap.build(*key) for key in keys]
        offsets = torch.stack([_by_offset(each) for each in maps])  # (maps, 2 h - 1, 2 w - 1)
        rows, row_class = offsets.transpose(0, 1).flatten(1).unique(dim=0, return_inverse=True)
        rows = rows.view(len(rows), len(maps), -1)  # (row classes, maps, 2 w - 1)
        columns, column_class = rows.unique(dim=2, return_inverse=True)
        buckets = columns.transpose(0, 1)  # (maps, row classes, column classes)
        prefix = [each.num_buckets - 1 if each.skip else 0 for each in maps]
        last = torch.tensor(prefix).view(-1, 1, 1).expand(-1, buckets.shape[1], 1)
        factors = (torch.cat([buckets, last], 2), row_class.byte(), column_class.byte())
        return Factors(*(each.to(device) for each in factors))


def _by_offset(buckets: BucketMap) -> Tensor:
    """(2 height - 1, 2 width - 1) int64: the bucket of a patch against one so many before it."""
    height, width = buckets.grid
    rows, columns = torch.arange(1 - height, height), torch.arange(1 - width, width)
    query = rows.clamp(min=0)[:, None] * width + columns.clamp(min=0)
    key = (-rows).clamp(min=0)[:, None] * width + (-columns).clamp(min=0)
    return buckets.ids[query + buckets.skip, key + buckets.skip].long()
