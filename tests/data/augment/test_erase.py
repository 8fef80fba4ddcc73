"""Random erasing against timm's; purity."""

import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from irpe_ds.config_types import EraseMode
from irpe_ds.data.augment import batched_ops
from irpe_ds.data.augment.policies import Erase, erase_boxes
from irpe_ds.data.rng import Keys, image_keys


def keys(count: int, seed: int = 0) -> Keys:
    return image_keys(np.arange(count), seed=seed, epoch=0)


def timms_boxes(count: int, height: int, width: int) -> np.ndarray:
    erase = RandomErasing(1.0, mode="pixel", device="cpu")
    random.seed(0)
    boxes = []
    for _ in range(count):
        erased = erase(torch.zeros(1, height, width))[0] != 0
        rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
        if len(rows):
            boxes.append((rows[0], columns[0], len(rows), len(columns)))
    return np.array(boxes, float)


@pytest.mark.parametrize(("height", "width"), [(32, 40), (48, 16)])
def test_boxes_are_distributed_as_timms(height: int, width: int) -> None:
    theirs = timms_boxes(4000, height, width)
    rows, ours = erase_boxes(keys(20000), 1.0, height, width)
    assert len(rows) / 20000 == pytest.approx(len(theirs) / 4000, abs=0.005)
    assert (ours[:, 0] + ours[:, 2]).max() == height
    assert (ours[:, 1] + ours[:, 3]).max() == width
    assert ours[:, :2].min() == 0
    for measure in (
        *(lambda boxes, column=column: boxes[:, column] for column in range(4)),
        lambda boxes: boxes[:, 2] * boxes[:, 3],
        lambda boxes: np.log(boxes[:, 2] / boxes[:, 3]),
    ):
        a, b = measure(theirs), measure(ours)
        error = 5 * a.std() / np.sqrt(len(a))
        assert b.mean() == pytest.approx(a.mean(), abs=error)
        assert b.std() == pytest.approx(a.std(), rel=0.06)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erase_probability(probability: float) -> None:
    rows, _ = erase_boxes(keys(20000), probability, 224, 224)
    error = 0.016 if probability == 0.25 else 0
    assert len(rows) / 20000 == pytest.approx(probability, abs=error)


def test_erase_fills_boxes_with_noise_and_nothing_else() -> None:
    images = torch.full((50, 3, 40, 40), 100.0)
    shown = Erase(0.5)(images, keys(50))
    assert shown is images
    rows, boxes = erase_boxes(keys(50), 0.5, 40, 40)
    expected = torch.zeros(50, 40, 40, dtype=torch.bool)
    for row, (top, left, height, width) in zip(rows, boxes, strict=True):
        expected[row, top : top + height, left : left + width] = True
    assert torch.equal((shown != 100).all(1), expected)
    assert torch.equal((shown != 100).any(1), expected)
    noise = shown[shown != 100]
    assert noise.mean() == pytest.approx(0, abs=5 / np.sqrt(len(noise)))
    assert noise.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(noise)))
    assert len(noise.unique()) > 0.99 * len(noise)  # of every pixel and channel its own


def test_erasing_is_a_function_of_pixels_and_key() -> None:
    images, images_keys = torch.zeros(30, 3, 24, 20), keys(30)
    shown = Erase(0.6)(images.clone(), images_keys)
    order = np.random.default_rng(0).permutation(30)[:17]
    assert torch.equal(Erase(0.6)(images[order], images_keys[order]), shown[order])
    layout = images.to(memory_format=torch.channels_last, copy=True)
    assert torch.equal(Erase(0.6)(layout, images_keys), shown)
    assert not torch.equal(Erase(0.6)(images.clone(), keys(30, seed=1)), shown)
    assert torch.equal(Erase(0.0)(images.clone(), images_keys), images)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_several_boxes_cover_as_much_as_timms(mode: EraseMode) -> None:
    theirs = RandomErasing(1.0, mode=mode, max_count=3, device="cpu")
    random.seed(0)
    expected = theirs(torch.full((3000, 3, 24, 20), 100.0)) != 100
    got = Erase(1.0, mode, 3)(torch.full((6000, 3, 24, 20), 100.0), keys(6000)) != 100
    for measure in (lambda x: x.float(), lambda x: x[:, 0].flatten(1).float().mean(1).square()):
        assert measure(got).mean().item() == pytest.approx(
            measure(expected).mean().item(), rel=0.05
        )


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["rand", "const"])
def test_a_box_of_one_colour(mode: EraseMode, count: int) -> None:
    """On the CPU, and by the kernels for GPUs."""
    on_cpu = Erase(1.0, mode, count)(torch.full((200, 3, 24, 20), 100.0), keys(200))
    batched = torch.full((200, 3, 24, 20), 100.0)
    for number in range(count):
        rows, boxes = erase_boxes(keys(200), 1.0, 24, 20, number, count)
        batched_ops.erase(batched, keys(200)[rows] + np.uint64(number), rows, boxes, mode)
    assert torch.equal(on_cpu == 100, batched == 100)
    for images in (on_cpu, batched):
        colours = [image.flatten(1)[:, image[0].flatten() != 100].unique(dim=1) for image in images]
        assert {c.shape[1] for c in colours} <= {*range(count + 1)}
        values = torch.cat([c.flatten() for c in colours])
        if mode == "const":
            assert not values.any()
        else:
            assert values.mean() == pytest.approx(0, abs=5 / np.sqrt(len(values)))
            assert values.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(values)))
            assert len(values.unique()) > 0.99 * len(values)
