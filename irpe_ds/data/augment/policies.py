"""Augmentation of a batch on its device: RandAugment, three-augment, colour jitter, erasing.

Its random numbers are drawn on the host from each image's own key, so that an image's pixels are
the same in any batch, and nothing waits for the device.

Shapes: N images of a batch or of a part of it, H x W pixels, C = 3 channels.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irpe_ds.config import AugmentConfig
from irpe_ds.config_types import EraseMode
from irpe_ds.data.augment import batched_ops, pixel_ops, spatial_ops
from irpe_ds.data.augment.pixel_ops import Arguments, to_device
from irpe_ds.data.rng import Keys, PerSampleRNG
from irpe_ds.errors import ConfigError

Function = Callable[[Tensor, Arguments], Tensor]
Indices = NDArray[np.int64]
Layer = list[tuple[Function, Indices, Arguments]]
"""Operations and the images of a batch that each applies to; an image occurs at most once."""

CPU_IMAGES = 1  # per thread and call: as many as its cache holds

ERASE_ATTEMPTS = 10
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)


class Policy(Protocol):
    def layers(self, keys: Keys, height: int, width: int) -> Iterator[Layer]:
        """Draw the operations on the images of these keys, layer by layer."""


class Augment:
    """The `auto` policy, then colour jitter, of uint8 images (B, 3, H, W) into new ones.

    Geometric operations fill with the channel mean. Images in channels_last save a copy.

    Raises:
        ConfigError: augment.auto is unknown, or augment.color_jitter comes with RandAugment.
    """

    def __init__(self, config: AugmentConfig, mean: tuple[float, float, float]) -> None:
        self.policies: list[Policy] = []
        if config.auto == "3a":
            self.policies.append(ThreeAugment())
        elif config.auto is not None:
            self.policies.append(RandAugment(config.auto, mean))
        if config.color_jitter:
            if any(isinstance(policy, RandAugment) for policy in self.policies):
                raise ConfigError("augment.color_jitter", "0 with RandAugment", config.color_jitter)
            self.policies.append(ColorJitter(config.color_jitter))

    def __call__(self, images: Tensor, keys: Keys) -> Tensor:
        images_NHWC = images.permute(0, 2, 3, 1).contiguous()
        _, height, width, _ = images_NHWC.shape
        for policy in self.policies:
            for layer in policy.layers(keys, height, width):
                images_NHWC = _apply(layer, images_NHWC)
        return images_NHWC.permute(0, 3, 1, 2)


def _apply(layer: Layer, images_NHWC: Tensor) -> Tensor:
    """Sort the images by function, apply each function to its images, and restore the order."""
    device = images_NHWC.device
    layer = layer if device.type == "cpu" else list(batched_ops.merge(layer))
    touched = np.concatenate([np.empty(0, np.int64), *(rows for _, rows, _ in layer)])
    rest = np.setdiff1d(np.arange(len(images_NHWC)), touched)
    order = np.concatenate([touched, rest])
    sorted_NHWC = images_NHWC.index_select(0, to_device(order, device))
    threads = torch.get_num_threads()
    at_once = CPU_IMAGES * threads if device.type == "cpu" else max(1, len(order))
    start = 0
    for function, rows, arguments in layer:
        for first in range(0, len(rows), at_once):
            some = slice(first, min(first + at_once, len(rows)))
            part_NHWC = sorted_NHWC[start + some.start : start + some.stop]
            part_NHWC.copy_(function(part_NHWC, arguments[some]))
        start += len(rows)
    return sorted_NHWC.index_select(0, to_device(np.argsort(order), device))


class Severity(NamedTuple):
    """What an operation's arguments are computed from (timm's level_to_arg)."""

    level_N: Arguments
    """Magnitude in [0, 10]."""
    sign_N: Arguments
    """-1 or 1."""
    height: int
    width: int


class Op(NamedTuple):
    """One operation, by timm's name."""

    name: str
    function: Function
    arguments: Callable[[Severity], Arguments]


def _enhancement(s: Severity) -> Arguments:
    return np.maximum(0.1, 1 + s.sign_N * (s.level_N / 10 * 0.9))


def _matrix(**entries: Arguments | float) -> Arguments:
    """Rows (a, b, c, d, e, f) of `affine`: the identity but for these entries."""
    identity = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 1.0, "f": 0.0}
    return np.stack(np.broadcast_arrays(*(identity | entries).values()), axis=-1)


def _rotation(s: Severity) -> Arguments:
    """Counter-clockwise about the centre by up to 30 degrees."""
    angle = -np.radians(s.sign_N * (s.level_N / 10 * 30))
    cos, sin, x, y = np.cos(angle), np.sin(angle), s.width / 2, s.height / 2
    return _matrix(a=cos, b=sin, c=x - cos * x - sin * y, d=-sin, e=cos, f=y + sin * x - cos * y)


def _shear(s: Severity) -> Arguments:
    return s.sign_N * (s.level_N / 10 * 0.3)


def _translation(s: Severity) -> Arguments:
    """As a share of the side."""
    return s.sign_N * (s.level_N / 10 * 0.45)


def rand_ops(fill: tuple[int, int, int]) -> tuple[Op, ...]:
    """timm's fifteen operations whose severity increases with the level."""
    warp = partial(spatial_ops.affine, fill=fill)
    return (
        Op("AutoContrast", pixel_ops.autocontrast, lambda s: s.level_N),
        Op("Equalize", pixel_ops.equalize, lambda s: s.level_N),
        Op("Invert", pixel_ops.invert, lambda s: s.level_N),
        Op("Rotate", warp, _rotation),
        Op("Posterize", pixel_ops.posterize, lambda s: 4 - np.trunc(s.level_N / 10 * 4)),
        Op("Solarize", pixel_ops.solarize, lambda s: 256 - np.trunc(s.level_N / 10 * 256)),
        Op("SolarizeAdd", pixel_ops.solarize_add, lambda s: np.trunc(s.level_N / 10 * 110)),
        Op("Color", pixel_ops.color, _enhancement),
        Op("Contrast", pixel_ops.contrast, _enhancement),
        Op("Brightness", pixel_ops.brightness, _enhancement),
        Op("Sharpness", spatial_ops.sharpness, _enhancement),
        Op("ShearX", warp, lambda s: _matrix(b=_shear(s))),
        Op("ShearY", warp, lambda s: _matrix(d=_shear(s))),
        Op("TranslateX", warp, lambda s: _matrix(c=_translation(s) * s.width)),
        Op("TranslateY", warp, lambda s: _matrix(f=_translation(s) * s.height)),
    )


class RandAugment:
    """timm's `rand-m..-n..-mstd..-p..-inc1`: n operations, each applied with probability p.

    The operations are drawn with replacement, and each draws its level from N(m, mstd).
    """

    def __init__(self, text: str, mean: tuple[float, float, float]) -> None:
        self.magnitude, self.deviation, self.count, self.probability = _parse(text)
        red, green, blue = (min(255, round(255 * channel)) for channel in mean)
        self.ops = rand_ops((red, green, blue))

    def layers(self, keys: Keys, height: int, width: int) -> Iterator[Layer]:
        for number in range(self.count):
            rng = PerSampleRNG(keys, f"randaugment {number}")
            choice = (rng.uniform(0) * len(self.ops)).astype(np.int64)
            choice[rng.uniform(1) >= self.probability] = -1
            sign = np.where(rng.uniform(2) < 0.5, -1.0, 1.0)
            level = np.clip(self.magnitude + self.deviation * rng.normal(3), 0, 10)
            parts: dict[Function, tuple[list[Indices], list[Arguments]]] = {}
            for index, op in enumerate(self.ops):
                rows = np.flatnonzero(choice == index)
                arguments = op.arguments(Severity(level[rows], sign[rows], height, width))
                rows_so_far, arguments_so_far = parts.setdefault(op.function, ([], []))
                rows_so_far.append(rows)
                arguments_so_far.append(arguments)
            yield [
                (function, np.concatenate(rows), np.concatenate(arguments))
                for function, (rows, arguments) in parts.items()
            ]


_SECTION = re.compile(r"(m|n|inc)(\d+)|(mstd|p)(\d+(?:\.\d+)?|\.\d+)")


def _parse(text: str) -> tuple[int, float, int, float]:
    """Magnitude, its deviation, the number of operations and their probability."""
    expected = "3a, or rand with m, n, mstd, p and inc1 as in rand-m9-mstd0.5-inc1"
    name, *sections = text.split("-")
    values: dict[str, str] = {}
    for section in sections:
        match = _SECTION.fullmatch(section)
        if name != "rand" or match is None:
            raise ConfigError("augment.auto", expected, repr(text))
        key, value = (group for group in match.groups() if group)
        values[key] = value
    magnitude, count = int(values.get("m", 10)), int(values.get("n", 2))
    deviation, probability = float(values.get("mstd", 0)), float(values.get("p", 0.5))
    if name != "rand" or values.get("inc") != "1" or not count:
        raise ConfigError("augment.auto", expected, repr(text))
    if probability > 1 or deviation > 100:
        raise ConfigError("augment.auto", "p up to 1 and mstd up to 100", repr(text))
    return magnitude, deviation, count, probability


class ThreeAugment:
    """DeiT III's: each image is solarised, grey or blurred (arXiv:2204.07118)."""

    def layers(self, keys: Keys, height: int, width: int) -> Iterator[Layer]:
        rng = PerSampleRNG(keys, "three-augment")
        choice = (rng.uniform(0) * 3).astype(np.int64)
        radius = 0.1 + 1.9 * rng.uniform(1)
        solarized, grey = np.flatnonzero(choice == 0), np.flatnonzero(choice == 1)
        blurred = np.argsort(radius)  # similar radii together: the widest of a part sets its cost
        blurred = blurred[choice[blurred] == 2]
        yield [
            (pixel_ops.solarize, solarized, np.full(len(solarized), 128.0)),
            (pixel_ops.grayscale, grey, np.zeros(len(grey))),
            (spatial_ops.gaussian_blur, blurred, radius[blurred]),
        ]


class ColorJitter:
    """Brightness, contrast and saturation, in an order and by factors drawn for each image."""

    functions = (pixel_ops.brightness, pixel_ops.contrast, pixel_ops.color)

    def __init__(self, strength: float) -> None:
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def layers(self, keys: Keys, height: int, width: int) -> Iterator[Layer]:
        rng = PerSampleRNG(keys, "color jitter")
        turn = np.argsort([rng.uniform(number) for number in range(3)], axis=0)
        factor = np.stack([rng.uniform(3 + number) for number in range(3)])
        factor = self.low + (self.high - self.low) * factor
        for chosen in turn:
            groups = [(index, np.flatnonzero(chosen == index)) for index in range(3)]
            yield [(self.functions[index], rows, factor[index, rows]) for index, rows in groups]


class Erase:
    """timm's random erasing of boxes in normalised images.

    A box has an area uniform in [0.02, 1/3] of the image's, divided by the number of boxes, and an
    aspect ratio (height over width) log-uniform in [0.3, 1/0.3]; if ten of them do not fit, it is
    left out.

    Args:
        mode: a box becomes N(0, 1) noise in every number, or in one of each channel, or 0.
        count: the number of boxes is uniform in 1 to count.
    """

    def __init__(self, probability: float, mode: EraseMode = "pixel", count: int = 1) -> None:
        self.probability, self.mode, self.count = probability, mode, count

    def __call__(self, images: Tensor, keys: Keys) -> Tensor:
        """Erase in place and return the images (B, 3, H, W)."""
        height, width = images.shape[2:]
        for number in range(self.count):
            rows, boxes = erase_boxes(keys, self.probability, height, width, number, self.count)
            seeds = keys[rows] + np.uint64(number)
            if images.device.type == "cpu":
                self._erase(images, seeds, rows, boxes)
            elif len(rows):
                batched_ops.erase(images, seeds, rows, boxes, self.mode)
        return images

    def _erase(self, images: Tensor, seeds: Keys, rows: Indices, boxes: Indices) -> None:
        generator = torch.Generator()
        for seed, row, (top, left, height, width) in zip(seeds, rows, boxes.tolist(), strict=True):
            box = images[row, :, top : top + height, left : left + width]
            if self.mode == "const":
                box.zero_()
                continue
            shape = box.shape if self.mode == "pixel" else (3, 1, 1)
            generator.manual_seed(int(seed))
            box.copy_(torch.randn(shape, generator=generator, dtype=images.dtype))


def erase_boxes(
    keys: Keys, probability: float, height: int, width: int, number: int = 0, count: int = 1
) -> tuple[Indices, NDArray[np.int64]]:
    """The images to erase in, (M,), and their boxes as top, left, height and width, (M, 4).

    Args:
        number: which of an image's boxes, from 0.
        count: the most boxes that it can have.
    """
    rng = PerSampleRNG(keys, f"erase {number}" if number else "erase")
    is_erased = PerSampleRNG(keys, "erase").uniform(0) < probability
    counts = 1 + (PerSampleRNG(keys, "erase count").uniform(0) * count).astype(np.int64)
    boxes = np.zeros((len(keys), 4), np.int64)
    pending = np.flatnonzero(is_erased & (number < counts))
    low, high = np.log(ERASE_ASPECT)
    for attempt in range(ERASE_ATTEMPTS):
        area, aspect, top, left = (rng.uniform(1 + 4 * attempt + n, pending) for n in range(4))
        area = height * width * (ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0]))
        area /= counts[pending]
        aspect = np.exp(low + aspect * (high - low))
        box_height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        box_width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (box_height < height) & (box_width < width)
        top, left = top * (height - box_height + 1), left * (width - box_width + 1)
        found = np.stack([top.astype(np.int64), left.astype(np.int64), box_height, box_width], 1)
        boxes[pending[fits]] = found[fits]
        pending = pending[~fits]
    rows = np.flatnonzero(boxes[:, 2:].any(1))
    return rows, boxes[rows]
