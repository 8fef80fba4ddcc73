"""Normalising, mixing and seeding of a batch."""

import numpy as np
import pytest
import torch

from irpe_ds.config import RunConfig
from irpe_ds.training.batch import Normalize, build_mixup, seed_step

CPU = torch.device("cpu")


def run_config(**augment: float) -> RunConfig:
    values = {"name": "x", "model": {"name": "deit", "num_classes": 4}}
    return RunConfig.model_validate(
        values | {"data": {"train": "a", "val": "b"}, "augment": augment}
    )


def test_normalize_is_torchvisions() -> None:
    from torchvision.transforms.v2.functional import normalize, to_dtype

    data = run_config().data
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    expected = normalize(to_dtype(images, torch.float32, scale=True), data.mean, data.std)
    torch.testing.assert_close(Normalize(data, CPU)(images), expected)


def test_mixup_is_off_unless_asked_for() -> None:
    assert build_mixup(run_config()) is None


@pytest.mark.parametrize(
    "augment", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_mixed_targets_are_smoothed_distributions(augment: dict[str, float]) -> None:
    mixup = build_mixup(run_config(label_smoothing=0.1, **augment))
    assert mixup is not None
    images, targets = mixup(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() == pytest.approx(0.1 / 4)


def test_a_step_is_seeded_by_run_step_and_rank() -> None:
    def draw(*seed: int) -> tuple[float, float]:
        seed_step(*seed)
        return torch.rand(()).item(), np.random.rand()

    first = draw(0, 5, 1)
    assert draw(0, 5, 1) == first
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 0)):
        torch_draw, numpy_draw = draw(*other)
        assert torch_draw != first[0]
        assert numpy_draw != first[1]
