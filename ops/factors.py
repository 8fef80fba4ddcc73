"""Bucket maps as two small classifications: what the fused kernels read in place of ids.

A map depends on the offset of two patches alone, and only through a class of its rows and a class
of its columns:

    b(i, j) = matrix[row_class[yi - yj]][column_class[xi - xj]]

With 1.9 as ratio a product map of any grid has 7 x 7 classes, an euclidean one 5 x 5. Maps that are
looked up together are classified together, so that cross, rows plus columns, has 7 x 7 too.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from irpe_ds.rpe.buckets import bucket_of, num_buckets


class MapSpec(NamedTuple):
    """What determines a BucketMap, and how it is read."""

    method: str
    height: int
    width: int
    skip: int
    ratio: float
    negated: bool = False
    """Whether the offset is that of the second token from the first, b(j, i)."""


class Factors(NamedTuple):
    """Of maps of one grid."""

    buckets: Tensor
    """(maps, row classes, column classes + 1) int64; the last column is the prefix tokens' bucket,
    or repeats a bucket where there are no prefix tokens."""
    row_class: Tensor
    """(2 height - 1,) uint8, by yi - yj + height - 1."""
    column_class: Tensor
    """(2 width - 1,) uint8, by xi - xj + width - 1."""


@functools.cache
def factor(maps: tuple[MapSpec, ...], device: torch.device, *, transposed: bool = False) -> Factors:
    """The factors of these maps, made once for each device.

    Args:
        transposed: rows and columns in each other's places in `buckets`.

    Raises:
        ValueError: the maps are of different grids or numbers of prefix tokens.
    """
    places = {each[1:4] for each in maps}
    if len(places) != 1:
        raise ValueError(f"expected maps of one grid and number of prefix tokens, got {places}")
    # Never freed, so that captured CUDA graphs stay valid. Real, normal tensors whatever the first
    # call is: torch.export (2.6 to 2.14) traces under a mode that makes fake ones, and inference
    # tensors cannot be saved for a backward pass.
    with _disable_current_modes(), torch.inference_mode(False):
        offsets = torch.stack([_by_offset(each) for each in maps])  # (maps, 2 h - 1, 2 w - 1)
        rows, row_class = offsets.transpose(0, 1).flatten(1).unique(dim=0, return_inverse=True)
        rows = rows.view(len(rows), len(maps), -1)  # (row classes, maps, 2 w - 1)
        columns, column_class = rows.unique(dim=2, return_inverse=True)
        buckets = columns.transpose(0, 1)  # (maps, row classes, column classes)
        buckets = buckets.mT if transposed else buckets
        prefix = [num_buckets(x.method, x.skip, x.ratio) - 1 if x.skip else 0 for x in maps]
        last = torch.tensor(prefix, device="cpu").view(-1, 1, 1).expand(-1, buckets.shape[1], 1)
        factors = (torch.cat([buckets, last], 2), row_class.byte(), column_class.byte())
        return Factors(*(each.to(device) for each in factors))


def same_classes(a: Factors, b: Factors) -> bool:
    """Whether rows and columns fall into the same classes, under FakeTensorMode too."""
    with _disable_current_modes():
        return all(map(torch.equal, a[1:], b[1:]))


def has_runs(factors: Factors) -> bool:
    """Whether each row class is one run of offsets, under FakeTensorMode too."""
    with _disable_current_modes():
        changes = factors.row_class.diff().count_nonzero()
        return int(changes) + 1 == len(factors.row_class.unique())


def _by_offset(spec: MapSpec) -> Tensor:
    """(2 height - 1, 2 width - 1) int64: the bucket of a patch against one so many before it."""
    rows = torch.arange(1 - spec.height, spec.height, device="cpu")[:, None]
    columns = torch.arange(1 - spec.width, spec.width, device="cpu")
    shape = (2 * spec.height - 1, 2 * spec.width - 1)
    buckets = bucket_of(spec.method, rows.expand(shape), columns.expand(shape), spec.ratio)
    return buckets.flip(0, 1) if spec.negated else buckets
