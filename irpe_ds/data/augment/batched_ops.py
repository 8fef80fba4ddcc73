"""Augmentation for GPUs: the operations of a whole batch in few kernels.

A GPU takes microseconds for what its host takes ten to start. The operations of pixel_ops and
spatial_ops, which are made for a CPU's caches, are here computed for all images of a layer at once,
with the same bytes: those of a point by one look-up, those that blend by one blend.

Shapes: N images of a part of a batch, P = H * W pixels, C = 3 channels.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irpe_ds.config_types import EraseMode
from irpe_ds.data.augment import pixel_ops, spatial_ops
from irpe_ds.data.augment.pixel_ops import Arguments, luminance, to_device
from irpe_ds.data.rng import Keys

Function = Callable[[Tensor, Arguments], Tensor]
Indices = NDArray[np.int64]
Part = tuple[Function, Indices, Arguments]
"""An operation, the images that it applies to, and their arguments."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SPLITMIX64 = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
"""Shifts and factors, as int64, of its finaliser but for the last, which leaves the upper bits."""
LEVELS = np.arange(256, dtype=np.uint8)

HOST_TABLES: dict[Function, Callable[[Arguments], NDArray[np.uint8]]] = {
    pixel_ops.invert: lambda arguments: ~LEVELS + np.zeros_like(arguments, np.uint8),
    pixel_ops.posterize: lambda bits: LEVELS & (256 - 2 ** (8 - bits)).astype(np.uint8),
    pixel_ops.solarize: lambda thresholds: np.where(thresholds <= LEVELS, ~LEVELS, LEVELS),
    pixel_ops.solarize_add: lambda added: LEVELS + (LEVELS < 128) * added.astype(np.uint8),
}
"""What each level becomes, (N, 256), by arguments (N, 1)."""


def merge(layer: Sequence[Part]) -> Iterator[Part]:
    """The parts of a layer as few calls, each with the images of all that it does."""
    host, device, blends = (
        [part for part in layer if part[0] in known and len(part[1])]
        for known in (HOST_TABLES, DEVICE_TABLES, WRITE_ORIGIN)
    )
    if host or device:
        yield _joined(partial(_look_up, host, device), [*host, *device])
    if blends:
        yield _joined(partial(_blend, blends), blends)
    for function, rows, arguments in layer:
        if function in {*HOST_TABLES, *DEVICE_TABLES, *WRITE_ORIGIN} or not len(rows):
            continue
        if isinstance(function, partial) and function.func is spatial_ops.affine:
            function = partial(affine, **function.keywords)
        yield function, rows, arguments


def _joined(function: Function, parts: Sequence[Part]) -> Part:
    _, rows, arguments = zip(*parts, strict=True)
    return function, np.concatenate(rows), np.concatenate(arguments)


def _look_up(
    host: Sequence[Part], device: Sequence[Part], images_NHWC: Tensor, _: Arguments
) -> Tensor:
    """Replace every level of every channel by its entry in a table."""
    tables: list[Tensor] = []
    if host:
        own = [HOST_TABLES[function](values.reshape(-1, 1)) for function, _, values in host]
        table = to_device(np.concatenate(own), images_NHWC.device)
        tables.append(table.unsqueeze(1).expand(-1, 3, -1))
    channels = torch.arange(0, 3 * 256, 256, device=images_NHWC.device)
    index_NP = (images_NHWC + channels).flatten(1)
    end = sum(len(rows) for _, rows, _ in host)
    for function, rows, _ in device:
        some = slice(end, end := end + len(rows))
        tables.append(DEVICE_TABLES[function](images_NHWC[some], index_NP[some]))
    return torch.cat(tables).flatten(1).gather(1, index_NP).view(images_NHWC.shape)


def _stretched(images_NHWC: Tensor, _: Tensor) -> Tensor:
    low, high = images_NHWC.amin((1, 2)).unsqueeze(-1), images_NHWC.amax((1, 2)).unsqueeze(-1)
    extent = high - low
    scale = torch.full_like(extent, 255, dtype=torch.float64) / extent
    levels = torch.arange(256, device=images_NHWC.device)
    tables = (levels * scale).sub_(low * scale).clamp_(0, 255)
    return tables.where(extent > 0, levels).to(torch.uint8)


def _equalized(images_NHWC: Tensor, index_NP: Tensor) -> Tensor:
    counts = torch.zeros(len(index_NP), 3 * 256, dtype=torch.int64, device=index_NP.device)
    counts = counts.scatter_add_(1, index_NP, torch.ones_like(index_NP)).view(-1, 3, 256)
    below = counts.cumsum(-1).sub_(counts)
    # Below the highest level there are fewer than all pixels, below those above it all of them.
    below_the_highest = (below % images_NHWC[0, ..., 0].numel()).amax(-1, keepdim=True)
    step = below_the_highest // 255
    tables = (below + step // 2).floor_divide_(step.clamp(min=1)).clamp_(max=255)
    return tables.where(step > 0, torch.arange(256, device=step.device)).to(torch.uint8)


DEVICE_TABLES: dict[Function, Callable[[Tensor, Tensor], Tensor]] = {
    pixel_ops.autocontrast: _stretched,
    pixel_ops.equalize: _equalized,
}
"""Tables (N, 3, 256) by images and, for each byte, (N, P * 3), the index of its level in them."""


def _blend(parts: Sequence[Part], images_NHWC: Tensor, factors_N: Arguments) -> Tensor:
    """From an origin at factor 0 to the image at 1, or beyond."""
    origin, grey_NHW, end = images_NHWC.float(), luminance(images_NHWC), 0
    for function, rows, _ in parts:
        some = slice(end, end := end + len(rows))
        WRITE_ORIGIN[function](grey_NHW[some], origin[some])
    factors = to_device(factors_N.astype(np.float32), origin.device).view(-1, 1, 1, 1)
    mixed = (images_NHWC - origin).mul_(factors).add_(origin)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _write_mean(grey_NHW: Tensor, origin: Tensor) -> None:
    pixels = grey_NHW[0].numel()
    origin.copy_((grey_NHW.sum((1, 2)) + pixels // 2).floor_divide_(pixels).view(-1, 1, 1, 1))


def _write_smooth(_: Tensor, origin: Tensor) -> None:
    three = origin[:, :-2] + origin[:, 1:-1] + origin[:, 2:]
    sums = three[:, :, :-2] + three[:, :, 1:-1] + three[:, :, 2:]
    inner = origin[:, 1:-1, 1:-1]
    inner.copy_(sums.add_(inner, alpha=4).add_(6.5).div_(13).floor_())


WRITE_ORIGIN: dict[Function, Callable[[Tensor, Tensor], object]] = {
    pixel_ops.brightness: lambda _, origin: origin.zero_(),
    pixel_ops.contrast: _write_mean,
    pixel_ops.color: lambda grey_NHW, origin: origin.copy_(grey_NHW.unsqueeze(-1)),
    spatial_ops.sharpness: _write_smooth,
}
"""Writes what images are blended with over their float copies, by their grey levels too."""


def affine(images_NHWC: Tensor, matrices_N6: Arguments, *, fill: tuple[int, int, int]) -> Tensor:
    """As spatial_ops.affine, both axes and all 4 x 4 pixels around a position at once."""
    count, height, width, _ = images_NHWC.shape
    device = images_NHWC.device
    by_x, by_y, shift = np.split(matrices_N6.reshape(-1, 2, 3).swapaxes(0, 1), 3, axis=-1)
    terms = (by_x * (np.arange(width) + 0.5), by_y * (np.arange(height) + 0.5), shift)
    along = to_device(np.concatenate(terms, -1), device).split((width, height, 1), -1)
    numbers = np.array([width, height, width - 1, height - 1, 0, -1, 0, 1, 2, *fill])
    size, last, zero, taps, level = to_device(numbers, device).split((2, 2, 1, 4, 3))
    position = along[0].unsqueeze(-2) + along[1].unsqueeze(-1) + along[2].unsqueeze(-1)
    position = position.flatten(2)  # (2, N, P): x, then y
    inside_NP = ((position >= 0) & (position < size.view(2, 1, 1))).all(0)
    position.sub_(0.5)
    first = position.floor()
    weights = _cubic_weights((position - first).float())
    taps_2N4P = (first.long().unsqueeze(2) + taps.view(4, 1)).clamp_(zero, last.view(2, 1, 1, 1))
    taps_2N4P[1] *= width
    index_N44P = taps_2N4P[1].unsqueeze(2) + taps_2N4P[0].unsqueeze(1)
    planes_CNP = torch.empty((3, count, height * width), device=device)
    planes_CNP.view(3, *images_NHWC.shape[:3]).copy_(images_NHWC.movedim(-1, 0))
    found = planes_CNP.gather(2, index_N44P.flatten(1).expand(3, -1, -1))
    found = found.view(3, *index_N44P.shape)
    lines_CN4P = torch.zeros_like(found[:, :, :, 0])
    for n, weight in enumerate(weights):
        lines_CN4P.addcmul_(found[:, :, :, n], weight[0].unsqueeze(1))
    total_CNP = torch.full_like(planes_CNP, 2.0**-10)  # more than the error of float32
    for n, weight in enumerate(weights):
        total_CNP.addcmul_(lines_CN4P[:, :, n], weight[1])
    total_CNP = total_CNP.clamp_(0, 255).where(inside_NP, level.view(3, 1, 1))
    return total_CNP.view(3, *images_NHWC.shape[:3]).movedim(0, -1).to(torch.uint8)


def _cubic_weights(t: Tensor) -> list[Tensor]:
    """Of the four pixels around a position that is t in [0, 1) after the second's centre."""
    square = t * t
    cube, twice = square * t, 2 * square
    return [twice - t - cube, 1 - twice + cube, t + square - cube, cube - square]


def erase(
    images: Tensor, keys: Keys, rows: Indices, boxes: Indices, mode: EraseMode = "pixel"
) -> None:
    """Fill boxes of images (B, 3, H, W), in place, with N(0, 1) noise or with 0.

    The noise is a function of the image's key and the place in its box, or the channel: SplitMix64
    as in data/rng, whose upper bits the inverse of the normal distribution maps.

    Args:
        keys: of the images to erase in, (M,).
        rows: their numbers in the batch, (M,).
        boxes: top, left, height and width, (M, 4).
    """
    *_, height, width = images.shape
    lines = 3 * boxes[:, 2]
    top, left, box_height, box_width = np.repeat(boxes, lines, axis=0).T
    line = np.arange(len(top)) - np.repeat(lines.cumsum() - lines, lines)
    channel, y = np.divmod(line, box_height)
    start = ((3 * np.repeat(rows, lines) + channel) * height + top + y) * width + left
    ends = box_width.cumsum()
    before = ends - box_width
    step = int(GOLDEN.astype(np.int64)) if mode == "pixel" else 0
    place = line * box_width - before if mode == "pixel" else channel
    counter = np.repeat(keys, lines) + place.astype(np.uint64) * GOLDEN
    table = np.stack([ends, start - before, counter.view(np.int64)])
    ends_L, start_L, counter_L = to_device(table, images.device)
    pixel = torch.arange(int(box_width.sum()), device=images.device)
    line_of_pixel = torch.bucketize(pixel, ends_L, right=True)
    target = start_L[line_of_pixel].add_(pixel)
    if mode == "const":
        images.put_(target, torch.zeros_like(target, dtype=images.dtype))
        return
    bits = counter_L[line_of_pixel].add_(pixel, alpha=step)
    for shift, factor in SPLITMIX64:
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))).mul_(factor)
    uniform = (bits >> 40) + 0.5  # of 24 bits, between -2 ** 23 and 2 ** 23
    noise = uniform.mul_(2.0**-23).erfinv_().mul_(2**0.5)
    images.put_(target, noise.to(images.dtype))
