"""What a GPU runs: the same bytes as the operations one by one, in few kernels."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from irpe_ds.config import AugmentConfig
from irpe_ds.data.augment import batched_ops, policies
from irpe_ds.data.augment.policies import Augment, Erase, erase_boxes
from irpe_ds.data.rng import Keys, image_keys

MEAN = (0.485, 0.456, 0.406)
RAND = "rand-m9-mstd0.5-inc1"
POLICIES = [(RAND, 0.0), ("rand-m10-mstd3-n4-p1-inc1", 0.0), ("3a", 0.3), (None, 1.5)]
META = torch.device("meta")


def keys(count: int, seed: int = 0) -> Keys:
    return image_keys(np.arange(count), seed=seed, epoch=0)


def pictures(count: int, height: int, width: int) -> Tensor:
    """Noise, dull noise and constants, (N, 3, H, W)."""
    draw = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), generator=draw, dtype=torch.uint8)
    images[::5] = images[::5] // 64 * 20 + 60
    images[::7] = images[::7, :, :1, :1]
    return images


def augment(auto: str | None, jitter: float) -> Augment:
    return Augment(AugmentConfig(auto=auto, color_jitter=jitter), MEAN)


@pytest.mark.parametrize("size", [(23, 37), (7, 5), (1, 1)])
@pytest.mark.parametrize(("auto", "jitter"), POLICIES)
def test_bytes_are_those_of_the_operations_one_by_one(
    auto: str | None, jitter: float, size: tuple[int, int]
) -> None:
    apply = policies._apply

    def merged(layer: policies.Layer, images: Tensor) -> Tensor:
        return apply(list(batched_ops.merge(layer)), images)

    for count in (1, 7, 256):
        images, images_keys = pictures(count, *size), keys(count)
        expected = augment(auto, jitter)(images, images_keys)
        with (
            mock.patch.object(policies, "_apply", merged),
            mock.patch.object(policies, "CPU_IMAGES", count),
        ):
            assert torch.equal(augment(auto, jitter)(images, images_keys), expected)


def test_every_operation_of_the_recipe_is_merged() -> None:
    known = {*batched_ops.HOST_TABLES, *batched_ops.DEVICE_TABLES, *batched_ops.WRITE_ORIGIN}
    (layer,) = policies.RandAugment("rand-n1-p1-inc1", MEAN).layers(keys(256), 8, 8)
    assert {function for function, _, _ in layer} >= known
    assert len(list(batched_ops.merge(layer))) == 3  # a look-up, a blend, a warp


class Launches(TorchDispatchMode):
    """Counts operators that move data; views and allocations start no kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        is_view = any(x.untyped_storage()._cdata in inputs for x in results)
        if results and (func._schema.is_mutable or not is_view) and "empty" not in func.__name__:
            self.count += any(x.device == META for x in results)
        return out


def launches(function: Callable[[Tensor, Keys], Tensor], dtype: torch.dtype, count: int) -> int:
    images = torch.empty(count, 3, 32, 32, dtype=dtype, device=META)
    with Launches() as found:
        function(images, keys(count))
    return found.count


@pytest.mark.parametrize("count", [64, 256, 1024])
def test_kernels_of_a_batch_are_few(count: int) -> None:
    """One by one there were 718 and, for 256 images, 122."""
    assert 100 < launches(augment(RAND, 0.0), torch.uint8, count) <= 230
    assert 10 < launches(Erase(0.25), torch.float32, count) <= 25


class TestErase:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_fills_boxes_with_noise_and_nothing_else(self, layout: torch.memory_format) -> None:
        images = torch.full((50, 3, 40, 33), 100.0).to(memory_format=layout)
        rows, boxes = erase_boxes(keys(50), 0.5, 40, 33)
        batched_ops.erase(images, keys(50)[rows], rows, boxes)
        expected = torch.zeros(50, 40, 33, dtype=torch.bool)
        for row, (top, left, height, width) in zip(rows, boxes, strict=True):
            expected[row, top : top + height, left : left + width] = True
        assert torch.equal((images != 100).all(1), expected)
        assert torch.equal((images != 100).any(1), expected)

    def test_nothing_to_erase_starts_nothing(self) -> None:
        assert launches(Erase(0.0), torch.float32, 8) == 0

    def test_noise_is_a_function_of_the_key(self) -> None:
        boxes = np.tile([2, 3, 9, 5], (6, 1))
        together, alone = torch.zeros(2, 6, 3, 16, 12)
        batched_ops.erase(together, keys(6), np.arange(6), boxes)
        for row in (4, 1, 0, 3, 5, 2):
            one = np.array([row])
            batched_ops.erase(alone, keys(6)[one], one, boxes[one] + [[row % 2, 0, 0, 0]])
        moved = together[1::2].roll(1, dims=-2)
        assert torch.equal(alone[::2], together[::2])
        assert torch.equal(alone[1::2], moved)
        assert not torch.equal(together[0], together[1])

    def test_noise_is_normal_and_independent(self) -> None:
        z = torch.zeros(40, 3, 64, 64)
        batched_ops.erase(z, keys(40), np.arange(40), np.tile([0, 0, 64, 64], (40, 1)))
        error = 5 / np.sqrt(z.numel())
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
            variance = float((z.double() ** (2 * power)).mean())
            found = float((z.double() ** power).mean())
            assert found == pytest.approx(moment, abs=error * np.sqrt(variance))
        for dim in range(4):
            product = z.narrow(dim, 1, z.shape[dim] - 1) * z.narrow(dim, 0, z.shape[dim] - 1)
            assert float(product.mean()) == pytest.approx(0, abs=5 / np.sqrt(product.numel()))
        assert z.isfinite().all()
        assert len(z.unique()) > 0.9 * z.numel()
