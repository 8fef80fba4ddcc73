"""Bucket ids in the register layout of mma.m16n8k16, as the fused kernels read them."""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from irpe_ds.ops.tracing import traced_as_constant
from irpe_ds.rpe.buckets import BucketMap


def packed_ids(buckets: BucketMap) -> Tensor:
    """The places of `ids` in `used_ids`, and their transpose, packed; made once per map and device.

    Returns:
        (2, ceil(L / 16), ceil(L / 32), 32 lanes, 16) uint8 on the device of `ids`.
    """
    height, width = buckets.grid
    return _packed(buckets.method, height, width, buckets.skip, buckets.ratio, buckets.ids.device)


@traced_as_constant
def _packed(
    method: str, height: int, width: int, skip: int, ratio: float, device: torch.device
) -> Tensor:
    return _pack_once(method, height, width, skip, ratio, device)


@functools.cache
def _pack_once(
    method: str, height: int, width: int, skip: int, ratio: float, device: torch.device
) -> Tensor:
    """Never freed, so that captured CUDA graphs stay valid: 91 KiB for 14 x 14 patches."""
    # A real, normal tensor whatever the first call is: torch.export (2.6 to 2.14) traces under a
    # mode that makes fake ones, and inference tensors cannot be saved for a backward pass.
    with _disable_current_modes(), torch.inference_mode(False):
        buckets = BucketMap.build(method, height, width, skip, ratio)
        places = torch.searchsorted(buckets.used_ids, buckets.ids.long())
        return torch.stack([pack_tiles(places), pack_tiles(places.T)]).to(device)


def pack_tiles(ids: Tensor) -> Tensor:
    """Ids in the order in which a warp of 32 threads keeps a tile of pairs in its registers.

    Tiles have 16 rows and 32 columns. Lane 4 g + t has 16 ids, number 4 n + 2 half + parity that
    of row 8 half + g and column 8 n + 2 t + parity: one load of 16 bytes, as mma.m16n8k16 lays
    out its sums.

    Args:
        ids: (L, L) integers below 256.

    Returns:
        (ceil(L / 16), ceil(L / 32), 32 lanes, 16) uint8; what is beyond L is zero.
    """
    length = ids.shape[0]
    rows, columns = -(-length // 16), -(-length // 32)
    padded = ids.new_zeros(rows * 16, columns * 32, dtype=torch.uint8)
    padded[:length, :length] = ids
    split = padded.view(rows, 2, 8, columns, 4, 4, 2)  # row, half, g, column, n, t, parity
    return split.permute(0, 3, 2, 5, 4, 1, 6).reshape(rows, columns, 32, 16)
