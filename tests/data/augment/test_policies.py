"""Policies and jitter against timm's and torchvision's; purity."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms import functional as torchvision

from irpe_ds.config import AugmentConfig
from irpe_ds.data.augment import pixel_ops, spatial_ops
from irpe_ds.data.augment.policies import (
    Augment,
    ColorJitter,
    RandAugment,
    ThreeAugment,
    rand_ops,
)
from irpe_ds.data.rng import Keys, image_keys
from irpe_ds.errors import ConfigError

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
RAND = "rand-m9-mstd0.5-inc1"


def keys(count: int, seed: int = 0) -> Keys:
    return image_keys(np.arange(count), seed=seed, epoch=0)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something smooth with a little noise."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(fine + draw.integers(-9, 10, fine.shape), 0, 255).astype(np.uint8)


def batch(count: int, height: int = 24, width: int = 20) -> Tensor:
    images = torch.from_numpy(np.stack([photo(height, width, seed) for seed in range(count)]))
    return images.permute(0, 3, 1, 2)  # as from the loader: channels_last


def augment(auto: str | None, jitter: float = 0.0) -> Augment:
    return Augment(AugmentConfig(auto=auto, color_jitter=jitter), MEAN)


def scalar(name: str, argument: object) -> float:
    """What varies in an operation's argument, ours or timm's; degrees for a rotation."""
    if np.ndim(argument) == 0:
        return float(argument)
    if len(argument) < 2:
        return float(argument[0]) if len(argument) else 0.0
    a, b, c, d, _, f = argument
    if name == "Rotate":
        return -np.degrees(np.arctan2(b, a))
    return {"ShearX": b, "ShearY": d, "TranslateXRel": c, "TranslateYRel": f}[name]


def timms_draws(text: str, count: int) -> dict[str, list[float]]:
    """The arguments of each of timm's operations over `count` images."""
    drawn: dict[str, list[float]] = {}
    transform = timm_augment.rand_augment_transform(text, {"img_mean": FILL})
    for op in transform.ops:

        def record(image: None, *arguments: float, name: str = op.name, **_: object) -> None:
            drawn.setdefault(name, []).append(scalar(name, arguments[:1]))

        op.aug_fn = record
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        transform(None)
    return drawn


def our_draws(text: str, count: int) -> dict[str, list[float]]:
    policy = RandAugment(text, MEAN)
    names = timm_augment._RAND_INCREASING_TRANSFORMS
    policy.ops = tuple(
        op._replace(function=name) for name, op in zip(names, policy.ops, strict=True)
    )
    drawn: dict[str, list[float]] = {}
    for layer in policy.layers(keys(count), 1, 1):
        for name, rows, arguments in layer:
            assert len(set(rows)) == len(rows) == len(arguments)
            drawn.setdefault(name, []).extend(scalar(name, argument) for argument in arguments)
    return drawn


@pytest.mark.parametrize("text", [RAND, "rand-m5-n3-p0.8-inc1", "rand-m9-mstd2-inc1"])
def test_draws_are_distributed_as_timms(text: str) -> None:
    count = 15000
    theirs, ours = timms_draws(text, count), our_draws(text, count)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        a, b = np.array(theirs[name]), np.array(ours[name])
        assert len(b) == pytest.approx(len(a), abs=6 * np.sqrt(2 * len(a))), name
        if name in ("AutoContrast", "Equalize", "Invert"):
            continue
        for moment in (lambda x: x, np.abs, np.square, lambda x: np.abs(x - 1)):
            u, v = moment(a), moment(b)
            error = 6 * np.sqrt(u.var() / len(u) + v.var() / len(v)) + 1e-9
            assert v.mean() == pytest.approx(u.mean(), abs=error), name


def test_levels_are_clipped_and_operations_drawn_with_replacement() -> None:
    policy = RandAugment("rand-m10-mstd3-p1-inc1", MEAN)
    policy.ops = tuple(
        op._replace(function=op.name, arguments=lambda s: s.level_N) for op in policy.ops
    )
    chosen = np.empty((2, 9000), object)
    for number, layer in enumerate(policy.layers(keys(9000), 1, 1)):
        for name, rows, level in layer:
            chosen[number, rows] = name
            assert 0 <= level.min() < level.max() == 10
    repeated = np.mean(chosen[0] == chosen[1])
    assert repeated == pytest.approx(1 / 15, abs=0.013)


def test_signs_are_even_and_tell_nothing_of_the_level() -> None:
    policy = RandAugment("rand-m5-mstd1-n1-p1-inc1", MEAN)
    policy.ops = tuple(
        op._replace(arguments=lambda s: np.stack([s.level_N, s.sign_N], -1)) for op in policy.ops
    )
    (layer,) = policy.layers(keys(60000), 1, 1)
    level, sign = np.concatenate([drawn for _, _, drawn in layer]).T
    error = 5 / np.sqrt(60000)
    assert set(sign) == {-1, 1}
    assert sign.mean() == pytest.approx(0, abs=error)
    assert level[sign > 0].std() == pytest.approx(level[sign < 0].std(), abs=error)
    assert np.corrcoef(level, sign)[0, 1] == pytest.approx(0, abs=error)
    assert [level.mean(), level.std()] == pytest.approx([5, 1], abs=error)


def test_randaugment_of_a_batch_is_its_operations_one_by_one() -> None:
    images = batch(60)
    expected = images.permute(0, 2, 3, 1).clone()
    for layer in RandAugment(RAND, MEAN).layers(keys(60), 24, 20):
        for function, rows, arguments in layer:
            for row, argument in zip(rows, arguments, strict=True):
                one = expected[row : row + 1].clone()
                expected[row] = function(one, np.array([argument]))[0]
    shown = augment(RAND)(images, keys(60)).permute(0, 2, 3, 1)
    assert torch.equal(shown, expected)
    untouched = (shown == images.permute(0, 2, 3, 1)).flatten(1).all(1).float().mean()
    assert 0.1 < untouched < 0.5


def test_uncovered_pixels_show_the_mean() -> None:
    images = np.zeros((1, 40, 40, 3), np.uint8)
    (warp,) = {op.function for op in rand_ops(FILL) if op.name == "TranslateX"}
    shown = warp(torch.from_numpy(images), np.array([[1, 0, 20, 0, 1, 0.0]]))
    assert not shown[:, :, :20].any()
    assert (shown[:, :, 20:] == torch.tensor(FILL)).all()
    white = torch.full((500, 3, 16, 16), 255, dtype=torch.uint8)
    shown = augment("rand-m10-n1-p1-inc1")(white, keys(500)).permute(0, 2, 3, 1)
    assert (shown[:, 0, 0] == torch.tensor(FILL, dtype=torch.uint8)).all(-1).any()


def test_three_augment_is_timms() -> None:
    count = 30000
    policy = timm_augment.auto_augment_transform("3a", {"img_mean": FILL})
    assert [[(op.name, op.prob, op.magnitude) for op in ops] for ops in policy.policy] == [
        [("Solarize", 1.0, 5)],
        [("Desaturate", 1.0, 10)],
        [("GaussianBlurRand", 1.0, 10)],
    ]
    ((solarize, grey, blur),) = ThreeAugment().layers(keys(count), 1, 1)
    assert [solarize[0], grey[0], blur[0]] == [
        pixel_ops.solarize,
        pixel_ops.grayscale,
        spatial_ops.gaussian_blur,
    ]
    every = np.concatenate([solarize[1], grey[1], blur[1]])
    assert np.array_equal(np.sort(every), np.arange(count))
    for _, rows, arguments in (solarize, grey, blur):
        assert len(rows) == len(arguments) == pytest.approx(count / 3, abs=450)
    assert set(solarize[2]) == {128}
    radii = blur[2]
    assert 0.1 <= radii.min() < 0.11
    assert 1.99 < radii.max() < 2.0
    assert np.histogram(radii, 10, (0.1, 2.0))[0] == pytest.approx(1000, abs=170)
    assert abs(np.corrcoef(radii, blur[1])[0, 1]) < 0.05


def test_three_augment_shows_timms_images() -> None:
    images = batch(30)
    shown = augment("3a")(images, keys(30)).permute(0, 2, 3, 1).numpy()
    (groups,) = ThreeAugment().layers(keys(30), 24, 20)
    theirs = (
        lambda image, _: timm_augment.solarize(image, 128),
        lambda image, _: timm_augment.desaturate(image, 1.0),
        lambda image, radius: timm_augment.gaussian_blur(image, radius),
    )
    for (_, rows, arguments), reference, bound in zip(groups, theirs, (0, 0, 3), strict=True):
        for row, argument in zip(rows, arguments, strict=True):
            before = Image.fromarray(images[row].permute(1, 2, 0).numpy())
            after = np.asarray(reference(before, float(argument))).astype(int)
            assert np.abs(after - shown[row]).max() <= bound


def jitter_draws(count: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Order (3, N) of the functions and factors (3, N) by function."""
    order, factors = np.full((3, count), -1), np.empty((3, count))
    for turn, layer in enumerate(ColorJitter(strength).layers(keys(count), 1, 1)):
        for function, rows, arguments in layer:
            index = ColorJitter.functions.index(function)
            order[turn, rows] = index
            factors[index, rows] = arguments
    return order, factors


def test_jitter_draws_any_order_and_uniform_factors() -> None:
    order, factors = jitter_draws(12000, 0.3)
    for permutation in itertools.permutations(range(3)):
        share = (order == np.array(permutation)[:, None]).all(0).mean()
        assert share == pytest.approx(1 / 6, abs=0.02)
    for one in factors:
        assert np.histogram(one, 10, (0.7, 1.3))[0] == pytest.approx(1200, abs=170)
    assert (
        np.abs(np.corrcoef(np.concatenate([factors, order[:1]]))[np.triu_indices(4, 1)]).max()
        < 0.05
    )
    assert jitter_draws(1000, 1.5)[1].min() >= 0


def test_jitter_shows_torchvisions_images() -> None:
    images = batch(20)
    order, factors = jitter_draws(20, 0.4)
    functions = (
        torchvision.adjust_brightness,
        torchvision.adjust_contrast,
        torchvision.adjust_saturation,
    )
    shown = augment(None, 0.4)(images, keys(20)).permute(0, 2, 3, 1).numpy()
    for row in range(20):
        image = Image.fromarray(images[row].permute(1, 2, 0).numpy())
        for index in order[:, row]:
            image = functions[index](image, factors[index, row])
        assert np.array_equal(np.asarray(image), shown[row])


POLICIES = [(RAND, 0.0), ("rand-m9-n4-p1-inc1", 0.0), ("3a", 0.0), ("3a", 0.3), (None, 0.3)]


@pytest.mark.parametrize(("auto", "jitter"), POLICIES)
def test_an_image_is_a_function_of_its_pixels_and_key(auto: str | None, jitter: float) -> None:
    images, images_keys = batch(40, 23, 37), keys(40)
    policy = augment(auto, jitter)
    before = images.clone()
    shown = policy(images, images_keys)
    assert torch.equal(images, before)
    assert shown.shape == images.shape
    assert shown.dtype == torch.uint8
    assert shown.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(policy(images, images_keys), shown)
    assert torch.equal(policy(images.contiguous(), images_keys), shown)
    order = np.random.default_rng(0).permutation(40)
    assert torch.equal(policy(images[order], images_keys[order]), shown[order])
    some = order[:11]
    assert torch.equal(policy(images[some], images_keys[some]), shown[some])
    for row in range(40):
        alone = slice(row, row + 1)
        assert torch.equal(policy(images[alone], images_keys[alone]), shown[alone])
    changed = (policy(images, keys(40, seed=1)) != shown).flatten(1).any(1)
    assert changed.float().mean() > 0.5


def test_threads_do_not_show() -> None:
    images, threads = batch(24, 128, 128), torch.get_num_threads()
    shown = {}
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            shown[number] = torch.cat([augment(a, j)(images, keys(24)) for a, j in POLICIES])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(shown[1], shown[2])
    assert torch.equal(shown[1], shown[3])


def test_nothing_to_do_and_empty_batches() -> None:
    images = batch(3)
    assert torch.equal(augment(None)(images, keys(3)), images)
    for auto, jitter in POLICIES:
        assert augment(auto, jitter)(images[:0], keys(0)).shape == (0, 3, 24, 20)


@pytest.mark.parametrize(
    "auto",
    [
        "rand",
        "rand-m9",
        "rand-m9-inc0",
        "rand-m9-inc1-tweights",
        "rand-m9-mmax10-inc1",
        "rand-m-inc1",
        "rand-m9.5-inc1",
        "rand-n0-inc1",
        "rand-p1.5-inc1",
        "rand-mstd101-inc1",
        "rand--inc1",
        "augmix-m3-inc1",
        "original",
        "3a-mstd0.5",
        "",
    ],
)
def test_what_is_not_understood_is_an_error(auto: str) -> None:
    with pytest.raises(ConfigError) as error:
        augment(auto)
    assert error.value.where == "augment.auto"
    assert error.value.got == repr(auto)


def test_sections_may_come_in_any_order() -> None:
    policy = RandAugment("rand-inc1-p.25-mstd1.5-n3-m7", MEAN)
    assert (policy.magnitude, policy.deviation, policy.count) == (7, 1.5, 3)
    assert policy.probability == 0.25
    policy = RandAugment("rand-inc1", MEAN)
    assert (policy.magnitude, policy.deviation, policy.count) == (10, 0, 2)
    assert policy.probability == 0.5


def test_jitter_does_not_go_with_randaugment() -> None:
    with pytest.raises(ConfigError) as error:
        augment(RAND, 0.3)
    assert error.value.where == "augment.color_jitter"
