"""Neighbourhood operations: filters and warps of uint8 images on any device.

They take images_NHWC with three channels and arguments per image in host memory, and return what
Pillow's operations return, in new memory.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from irpe_ds.data.augment.pixel_ops import Arguments, blend, per_image, to_bytes, to_device


def sharpness(images_NHWC: Tensor, factors_N: Arguments) -> Tensor:
    """Away from, or towards, the mean of 3 x 3 pixels with the centre counted five times.

    Bitwise as Pillow, which leaves the border unchanged.
    """
    values = images_NHWC.float()
    three = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    sums = three[:, :, :-2] + three[:, :, 1:-1] + three[:, :, 2:]
    smooth = values.clone()
    smooth[:, 1:-1, 1:-1] = ((sums + 4 * values[:, 1:-1, 1:-1] + 6.5) / 13).floor()
    return blend(smooth, images_NHWC, factors_N)


def gaussian_blur(images_NHWC: Tensor, sigmas_N: Arguments) -> Tensor:
    """A Gaussian of this deviation in pixels, as three box filters along each axis.

    The boxes end in fractions of a pixel (Gwosdek et al., SSVM 2011). Pillow rounds after each of
    the six filters, this function once: they differ by at most three levels, mostly by 0 or 1.
    """
    radii_N = _box_radii(sigmas_N)
    distances_R = np.arange(1, 2 + int(radii_N.max()))
    weights_RN = np.clip(radii_N + 1 - distances_R[:, None], 0, 1)
    weights = [per_image(weights_N, images_NHWC, torch.float32) for weights_N in weights_RN]
    blurred = _filter_thrice(_filter_thrice(images_NHWC, weights, axis=2), weights, axis=1)
    scale_N = (1 + 2 * weights_RN.sum(0)) ** -6
    return to_bytes((blurred * per_image(scale_N, images_NHWC, torch.float32)).add_(0.5))


def _box_radii(sigmas_N: Arguments) -> Arguments:
    """Half-widths, without the centre, of the box that applied three times has these deviations."""
    variance = sigmas_N**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def _filter_thrice(images_NHWC: Tensor, weights: Sequence[Tensor], axis: int) -> Tensor:
    """Three times x[i] + sum over r of weights[r] * (x[i - r] + x[i + r]), edges repeated."""
    length, reach = images_NHWC.shape[axis], len(weights)
    shape = list(images_NHWC.shape)
    shape[axis] += 2 * reach
    source = torch.empty(shape, device=images_NHWC.device)
    target = torch.empty_like(source)
    source.narrow(axis, reach, length).copy_(images_NHWC)
    for _ in range(3):
        end = reach + length
        source.narrow(axis, 0, reach).copy_(source.narrow(axis, reach, 1))
        source.narrow(axis, end, reach).copy_(source.narrow(axis, end - 1, 1))
        centre, out = source.narrow(axis, reach, length), target.narrow(axis, reach, length)
        for distance, weight in enumerate(weights, 1):
            before = source.narrow(axis, reach - distance, length)
            after = source.narrow(axis, reach + distance, length)
            torch.addcmul(centre, before, weight, out=out)
            centre = out.addcmul_(after, weight)
        source, target = target, source
    return source.narrow(axis, reach, length)


def affine(images_NHWC: Tensor, matrices_N6: Arguments, *, fill: tuple[int, int, int]) -> Tensor:
    """Pixel (x, y) becomes the one at (a x + b y + c, d x + e y + f), or `fill` outside the image.

    Matrices are rows (a, b, c, d, e, f); pixel i spans [i, i + 1). The interpolation is Pillow's
    bicubic: a cubic convolution with parameter -1, edges repeated, truncated. One value in a
    thousand differs from Pillow's, by one level.
    """
    count, height, width, _ = images_NHWC.shape
    device = images_NHWC.device
    a, b, c, d, e, f = to_device(matrices_N6, device).view(count, 6, 1, 1).unbind(1)
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device).view(height, 1) + 0.5
    x_NHW, y_NHW = a * x + b * y + c, d * x + e * y + f
    inside_NHW = (x_NHW >= 0) & (x_NHW < width) & (y_NHW >= 0) & (y_NHW < height)
    columns, column_weights = _cubic_taps(x_NHW, width, stride=1)
    rows, row_weights = _cubic_taps(y_NHW, height, stride=width)
    planes_CNP = images_NHWC.permute(3, 0, 1, 2).flatten(2).float()
    total_CNP = torch.full_like(planes_CNP, 2.0**-10)  # more than the error of float32
    line_CNP, found_NP = torch.empty_like(planes_CNP), torch.empty_like(planes_CNP[0])
    for row, row_weight in zip(rows, row_weights, strict=True):
        line_CNP.zero_()
        for column, column_weight in zip(columns, column_weights, strict=True):
            index_NP = row + column
            for plane_NP, line_NP in zip(planes_CNP, line_CNP, strict=True):
                torch.gather(plane_NP, 1, index_NP, out=found_NP)
                line_NP.addcmul_(found_NP, column_weight)
        total_CNP.addcmul_(line_CNP, row_weight)
    outside_NP = ~inside_NHW.flatten(1)
    for total_NP, level in zip(total_CNP, fill, strict=True):
        total_NP.clamp_(0, 255).masked_fill_(outside_NP, level)
    return to_bytes(total_CNP).movedim(0, -1).reshape(images_NHWC.shape)


def _cubic_taps(
    position_NHW: Tensor, length: int, stride: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Offsets and weights, (N, P), of the four pixels around each of P = H * W positions."""
    position_NP = (position_NHW - 0.5).flatten(1)
    first_NP = position_NP.floor()
    t = (position_NP - first_NP).float()
    square, cube = t * t, t * t * t
    weights = [2 * square - t - cube, 1 - 2 * square + cube, t + square - cube, cube - square]
    first_NP = first_NP.long()
    offsets = [(first_NP + i).clamp_(0, length - 1) * stride for i in (-1, 0, 1, 2)]
    return offsets, weights
