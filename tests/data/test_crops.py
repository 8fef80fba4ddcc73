"""Crop boxes and flips."""

from typing import Any

import numpy as np
import pytest

from irpe_ds.data.crops import PADDING, Crops, center_crops, random_resized_crops, simple_crops
from irpe_ds.data.rng import image_keys


def draw(samples: np.ndarray, height: int = 400, width: int = 500, **options: Any) -> Crops:
    heights, widths = np.full(len(samples), height), np.full(len(samples), width)
    keys = image_keys(samples, seed=options.pop("seed", 0), epoch=options.pop("epoch", 0))
    defaults = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5}
    return random_resized_crops(samples, heights, widths, keys, **defaults | options)


@pytest.mark.parametrize(("height", "width"), [(400, 500), (32, 32), (1, 1), (3, 300), (300, 3)])
def test_boxes_lie_within_their_images(height: int, width: int) -> None:
    crops = draw(np.arange(5000), height, width)
    assert min(crops["top"].min(), crops["left"].min()) >= 0
    assert min(crops["height"].min(), crops["width"].min()) >= 1
    assert (crops["top"] + crops["height"]).max() <= height
    assert (crops["left"] + crops["width"]).max() <= width


def test_crop_is_a_function_of_seed_epoch_and_sample_alone() -> None:
    crops = draw(np.arange(1000))
    some = np.array([999, 5, 17, 5])
    assert np.array_equal(draw(some), crops[some])
    for other in ({"seed": 1}, {"epoch": 1}):
        assert np.mean(draw(np.arange(1000), **other)["top"] == crops["top"]) < 0.1
    # seed and epoch are not summed up
    assert not np.array_equal(
        draw(np.arange(9), seed=1, epoch=0)["top"], draw(np.arange(9), seed=0, epoch=1)["top"]
    )


def test_crop_follows_scale_and_ratio() -> None:
    crops = draw(np.arange(20000), 1000, 1000, scale=(0.1, 0.5), ratio=(0.5, 2.0))
    area = crops["height"].astype(float) * crops["width"] / 1e6
    aspect = np.log(crops["width"] / crops["height"])
    assert area.min() == pytest.approx(0.1, abs=2e-3)
    assert area.max() == pytest.approx(0.5, abs=2e-3)
    assert area.mean() == pytest.approx(0.3, abs=3e-3)  # nearly every first draw fits
    assert np.abs(aspect).max() == pytest.approx(np.log(2), abs=1e-2)
    assert aspect.mean() == pytest.approx(0, abs=1e-2)
    free = crops["top"] / (1000 - crops["height"] + 1)
    assert np.histogram(free, 10, (0, 1))[0] == pytest.approx(2000, rel=0.1)


def test_crops_are_distributed_as_torchvisions() -> None:
    import torch
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, 40, 120)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.3, 1.0], [0.75, 4 / 3]) for _ in range(4000)]
    )
    ours = draw(np.arange(4000), 40, 120, scale=(0.3, 1.0))
    for column, name in enumerate(("top", "left", "height", "width")):
        a, b = theirs[:, column], ours[name]
        assert b.mean() == pytest.approx(a.mean(), abs=5 * a.std() / np.sqrt(2000))
        assert b.std() == pytest.approx(a.std(), rel=0.1)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips(probability: float) -> None:
    flips = draw(np.arange(20000), hflip=probability)["flip"]
    assert flips.mean() == pytest.approx(probability, abs=0.012 if probability == 0.3 else 0)


def test_flip_is_independent_of_crop_and_of_neighbours() -> None:
    crops = draw(np.arange(20000))
    assert abs(np.corrcoef(crops["flip"], crops["left"])[0, 1]) < 0.03
    assert abs(np.corrcoef(crops["left"][1:], crops["left"][:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(crops["flip"][1:], crops["flip"][:-1])[0, 1]) < 0.03


def test_no_augmentation_shows_the_whole_image() -> None:
    crops = draw(np.arange(100), 375, 500, scale=(1.0, 1.0), ratio=(0.01, 100.0), hflip=0.0)
    whole = (crops["height"] == 375) & (crops["width"] == 500)
    assert whole.any()
    assert not crops["flip"].any()
    crops = draw(np.arange(100), 32, 32, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    assert set(crops["top"]) == set(crops["left"]) == {0}
    assert set(crops["height"]) == set(crops["width"]) == {32}


def test_image_too_narrow_for_any_draw_is_cropped_at_its_centre() -> None:
    crops = draw(np.arange(10), 1000, 30, scale=(0.9, 1.0))
    assert set(crops["width"]) == {30}
    assert set(crops["height"]) == {40}  # 30 / (3 / 4)
    assert set(crops["top"]) == {480}


@pytest.mark.parametrize(
    ("height", "width", "aspect", "share", "box"),
    [
        (400, 500, 1.0, 1.0, (0, 50, 400, 400)),
        (400, 500, 1.0, 0.875, (25, 75, 350, 350)),
        (500, 400, 1.0, 0.5, (150, 100, 200, 200)),
        (400, 500, 2.0, 1.0, (75, 0, 250, 500)),
        (10, 10, 1.0, 0.0, (4, 4, 1, 1)),
    ],
)
def test_centre(
    height: int, width: int, aspect: float, share: float, box: tuple[int, int, int, int]
) -> None:
    (crop,) = center_crops(
        np.array([7]), np.array([height]), np.array([width]), aspect=aspect, share=share
    )
    assert tuple(crop[name] for name in ("top", "left", "height", "width")) == box
    assert (crop["sample"], crop["flip"]) == (7, 0)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (300, 300), (20, 15), (5, 400)])
def test_simple_crops_are_distributed_as_deits(height: int, width: int) -> None:
    """Of the image scaled to cover 16 x 16, the box of that size in it and 4 pixels around."""
    count = 20000
    samples = np.arange(count)
    sides = np.full(count, height), np.full(count, width)
    keys = image_keys(samples, seed=0, epoch=0)
    crops = simple_crops(samples, *sides, keys, size=(16, 16), hflip=0.25)
    shrink = min(height, width) / 16
    for side, first, shift, length in (
        ("height", "top", "shift_down", height),
        ("width", "left", "shift_right", width),
    ):
        assert crops[first].min() == 0
        assert (crops[first] + crops[side]).max() == length
        assert crops[side] == pytest.approx(16 * shrink, abs=0.5)
        free = round(length / shrink) - 16
        place = np.rint(crops[first] / shrink) + crops[shift]
        counted = np.bincount((place + PADDING).astype(int), minlength=free + 2 * PADDING + 1)
        if shrink >= 1:  # else places share a pixel of the source
            mean = count / (free + 2 * PADDING + 1)
            assert len(counted) == free + 2 * PADDING + 1
            assert counted == pytest.approx(mean, abs=6 * np.sqrt(mean))
        assert not crops[shift][(crops[first] > 0) & (crops[first] + crops[side] < length)].any()
    assert crops["flip"].mean() == pytest.approx(0.25, abs=0.02)
