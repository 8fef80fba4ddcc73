"""Point operations: each output pixel from one input pixel, for uint8 images on any device.

Each takes images_NHWC with three channels and one argument per image in host memory, and returns
the same bytes as Pillow's operation of that name, in new memory.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arguments = NDArray[np.float64]

LEVELS = 256  # of a byte


def invert(images_NHWC: Tensor, _: Arguments) -> Tensor:
    return images_NHWC.bitwise_not()


def posterize(images_NHWC: Tensor, bits_N: Arguments) -> Tensor:
    """Keep this many of the upper bits; 0, which timm asks for, is refused by Pillow 13."""
    masks_N = LEVELS - 2 ** (8 - bits_N)
    return images_NHWC & per_image(masks_N, images_NHWC, torch.uint8)


def solarize(images_NHWC: Tensor, thresholds_N: Arguments) -> Tensor:
    """Invert the values from the threshold up."""
    last_dark = per_image(thresholds_N - 1, images_NHWC, torch.int16)
    bright = (last_dark - images_NHWC.to(torch.int16)) >> 15  # -1 there, else 0
    return images_NHWC ^ bright.to(torch.uint8)


def solarize_add(images_NHWC: Tensor, additions_N: Arguments) -> Tensor:
    """Add at most 128 to the values below 128."""
    dark = (images_NHWC >> 7) ^ 1
    return images_NHWC + dark * per_image(additions_N, images_NHWC, torch.uint8)


def brightness(images_NHWC: Tensor, factors_N: Arguments) -> Tensor:
    return blend(torch.zeros((), device=images_NHWC.device), images_NHWC, factors_N)


def contrast(images_NHWC: Tensor, factors_N: Arguments) -> Tensor:
    """Away from, or towards, the mean grey level of the image."""
    grey_NHW = luminance(images_NHWC)
    mean_N = grey_NHW.sum((1, 2)).double() / grey_NHW[0].numel()
    mean_N = (mean_N + 0.5).floor().float()
    return blend(mean_N.view(-1, 1, 1, 1), images_NHWC, factors_N)


def color(images_NHWC: Tensor, factors_N: Arguments) -> Tensor:
    return blend(grayscale(images_NHWC, factors_N).float(), images_NHWC, factors_N)


def grayscale(images_NHWC: Tensor, _: Arguments) -> Tensor:
    grey_NHW = luminance(images_NHWC).to(torch.uint8)
    return torch.stack((grey_NHW, grey_NHW, grey_NHW), -1)


def autocontrast(images_NHWC: Tensor, _: Arguments) -> Tensor:
    """Stretch each channel over all levels."""
    low, high = images_NHWC.amin((1, 2)).double(), images_NHWC.amax((1, 2)).double()
    low, extent = low.unsqueeze(1), (high - low).unsqueeze(1)
    scale = torch.full_like(extent, 255) / extent  # 255 / extent would round twice
    levels = _levels(images_NHWC).double()
    tables = (levels * scale - low * scale).clamp(0, 255)
    return _look_up(tables.where(extent > 0, levels), images_NHWC)


def equalize(images_NHWC: Tensor, _: Arguments) -> Tensor:
    """Equalise the histogram of each channel."""
    index_NP = _table_index(images_NHWC)
    counts = torch.zeros(len(images_NHWC), LEVELS * 3, dtype=torch.int64, device=index_NP.device)
    counts.scatter_add_(1, index_NP, torch.ones_like(index_NP))
    counts = counts.view(-1, LEVELS, 3)
    below = counts.cumsum(1) - counts
    below_the_highest = (below * (counts > 0)).amax(1, keepdim=True)
    step = below_the_highest // 255
    tables = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(tables.where(step > 0, _levels(images_NHWC)), images_NHWC)


def luminance(images_NHWC: Tensor) -> Tensor:
    """Pillow's mode L as int32 (N, H, W)."""
    red, green, blue = images_NHWC.unbind(-1)
    sum_NHW = red.to(torch.int32) * 19595
    sum_NHW.add_(green, alpha=38470).add_(blue, alpha=7471).add_(1 << 15)
    return sum_NHW.bitwise_right_shift_(16)


def blend(origin: Tensor, images_NHWC: Tensor, factors_N: Arguments) -> Tensor:
    """From the origin (float, broadcast) at factor 0 to the image at 1, or beyond; truncated."""
    mixed = images_NHWC.float().sub_(origin)
    mixed.mul_(per_image(factors_N, images_NHWC, torch.float32)).add_(origin)
    return to_bytes(mixed.clamp_(0, 255))


def to_bytes(values: Tensor) -> Tensor:
    """Truncate floats in [0, 256), through int16: PyTorch vectorises that conversion on CPUs."""
    return values.to(torch.int16).to(torch.uint8)


def per_image(values_N: Arguments, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Host numbers as (N, 1, 1, 1) on the images' device."""
    return to_device(values_N, images.device).to(dtype).view(-1, 1, 1, 1)


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy host numbers to the device without waiting for it."""
    tensor = torch.from_numpy(values)
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def _levels(images: Tensor) -> Tensor:
    return torch.arange(LEVELS, device=images.device).view(LEVELS, 1)


def _table_index(images_NHWC: Tensor) -> Tensor:
    """The index of each byte's entry in a table (256, 3) of its image, (N, H * W * 3)."""
    channels = torch.arange(3, device=images_NHWC.device)
    return (images_NHWC.long() * 3 + channels).flatten(1)


def _look_up(tables_NLC: Tensor, images_NHWC: Tensor) -> Tensor:
    """Replace each level by its entry in its channel's table, truncated."""
    tables = tables_NLC.to(torch.uint8).flatten(1)
    return tables.gather(1, _table_index(images_NHWC)).view(images_NHWC.shape)
