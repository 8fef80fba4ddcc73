"""Image operations against Pillow's, torchvision's and timm's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms import functional as torchvision

from irpe_ds.data.augment import pixel_ops, spatial_ops
from irpe_ds.data.augment.policies import Severity, rand_ops

FILL = (124, 116, 104)
GEOMETRIC = ("Rotate", "Shear", "Translate")
SIZES = [(40, 33), (7, 5), (2, 3), (1, 1)]
FACTORS = [0.0, 0.1, 0.33, 0.77, 1.0, 1.2, 1.9, 2.5]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something smooth with a little noise."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(fine + draw.integers(-9, 10, fine.shape), 0, 255).astype(np.uint8)


def pictures(height: int, width: int) -> np.ndarray:
    """A photo, noise, black and white noise, dull noise, and constants: (8, H, W, 3)."""
    draw = np.random.default_rng(1)
    shape = (height, width, 3)
    noise = [draw.integers(0, 256, shape), 255 * draw.integers(0, 2, shape)]
    dull = [draw.integers(100, 120, shape)]
    constant = [np.full(shape, level) for level in (0, 77, 127, 255)]
    return np.stack([photo(height, width), *noise, *dull, *constant]).astype(np.uint8)


def difference(
    function: Callable[[Tensor, np.ndarray], Tensor],
    arguments: np.ndarray,
    reference: Callable[[Image.Image], Image.Image],
    images: np.ndarray,
) -> np.ndarray:
    before = torch.from_numpy(images.copy())
    ours = function(before, arguments)
    assert ours.dtype == torch.uint8
    assert np.array_equal(before.numpy(), images), "the operation changed its input"
    theirs = np.stack([np.asarray(reference(Image.fromarray(image))) for image in images])
    return np.abs(ours.numpy().astype(int) - theirs)


POINT_OPS = [
    (pixel_ops.invert, lambda image, _: ImageOps.invert(image), [0]),
    (pixel_ops.posterize, lambda image, bits: ImageOps.posterize(image, bits), [1, 2, 4, 8]),
    (pixel_ops.solarize, ImageOps.solarize, [0, 1, 26, 128, 255, 256]),
    (pixel_ops.solarize_add, timm_augment.solarize_add, [0, 1, 50, 110, 128]),
    (pixel_ops.autocontrast, lambda image, _: ImageOps.autocontrast(image), [0]),
    (pixel_ops.equalize, lambda image, _: ImageOps.equalize(image), [0]),
    (pixel_ops.grayscale, lambda image, _: torchvision.to_grayscale(image, 3), [0]),
    (pixel_ops.brightness, torchvision.adjust_brightness, FACTORS),
    (pixel_ops.contrast, torchvision.adjust_contrast, FACTORS),
    (pixel_ops.color, torchvision.adjust_saturation, FACTORS),
    (spatial_ops.sharpness, lambda image, f: ImageEnhance.Sharpness(image).enhance(f), FACTORS),
]


@pytest.mark.parametrize("size", [(64, 64), *SIZES])
@pytest.mark.parametrize(
    ("function", "reference", "arguments"), POINT_OPS, ids=lambda x: getattr(x, "__name__", "")
)
def test_pixels_are_pillows(
    function: Any, reference: Any, arguments: list[float], size: tuple[int, int]
) -> None:
    images = pictures(*size)
    for argument in arguments:
        each = np.full(len(images), float(argument))
        found = difference(function, each, lambda image, a=argument: reference(image, a), images)
        assert found.max() == 0, argument


def test_posterize_to_no_bits_is_black() -> None:
    images = torch.from_numpy(pictures(8, 8))
    assert not pixel_ops.posterize(images, np.zeros(len(images))).any()


@pytest.mark.parametrize("size", [(64, 50), *SIZES])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6, 1.0, 1.41, 1.42, 1.7, 2.0, 3.7])
def test_blur_is_pillows_but_for_its_six_roundings(sigma: float, size: tuple[int, int]) -> None:
    images = pictures(*size)
    sigmas = np.full(len(images), sigma)
    found = difference(
        spatial_ops.gaussian_blur,
        sigmas,
        lambda image: image.filter(ImageFilter.GaussianBlur(sigma)),
        images,
    )
    assert found.max() <= 3
    assert found[0].mean() < (1.2 if sigma < 1 else 0.75)
    assert found[4:].max() == 0


def test_blurs_of_a_batch_do_not_touch_each_other() -> None:
    images = torch.from_numpy(np.stack([photo(30, 31, seed) for seed in range(5)]))
    sigmas = np.array([0.1, 1.3, 1.5, 1.9, 0.7])
    together = spatial_ops.gaussian_blur(images, sigmas)
    for row in range(5):
        alone = spatial_ops.gaussian_blur(images[row : row + 1], sigmas[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("size", [(64, 50), *SIZES])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("level", [0.0, 1.0, 4.97, 9.0, 9.99, 10.0])
def test_operations_are_timms_at_every_level(
    level: float, sign: float, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    height, width = size
    images = pictures(*size)
    severity = Severity(np.full(len(images), level), np.full(len(images), sign), height, width)
    names = timm_augment._RAND_INCREASING_TRANSFORMS
    for name, op in zip(names, rand_ops(FILL), strict=True):
        if name.startswith("Posterize") and level == 10:
            continue  # Pillow 13 refuses to keep no bits
        their_function = timm_augment.AugmentOp(name, prob=1.0, magnitude=level).aug_fn
        level_function = timm_augment.LEVEL_TO_ARG[name]
        arguments = level_function(level, {}) if level_function else ()
        options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
        found = difference(
            op.function,
            op.arguments(severity),
            lambda image, f=their_function, a=arguments, o=options: f(image, *a, **o),
            images,
        )
        assert found.max() <= (1 if name.startswith(GEOMETRIC) else 0), name
        assert (found > 0).mean() < 0.02, name
