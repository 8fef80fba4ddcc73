"""The data of a run, checked before it starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from irpe_ds.config import DataConfig, RunConfig
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.errors import ConfigError
from irpe_ds.training import evaluation


def test_label_that_the_model_has_no_class_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a .beton file without manifest."""
    values = {
        "name": "x",
        "model": {"name": "deit", "num_classes": 12},
        "data": {"train": "a.beton", "val": "b"},
    }
    info = DatasetInfo(path=Path("a.beton"), num_samples=9, classes=None, largest_label=(12, 7))
    monkeypatch.setattr(evaluation, "dataset_info", lambda data, part: info)
    expected = (
        r"model\.num_classes: expected more than 12, the label of sample 7 of a\.beton, got 12"
    )
    with pytest.raises(ConfigError, match=expected):
        evaluation.open_checked(RunConfig.model_validate(values), "train")


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (("cat", "cow", "emu"), "got others: without 'ant', 'dog', with 'cow', 'emu'"),
        (("cat", "ant", "dog"), "got another order"),
        (("ant", "cat"), "got others: without 'dog'"),
    ],
)
def test_other_classes_in_validation_are_named(
    val: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {"train": ("ant", "cat", "dog"), "val": val}

    def dataset_info(_: DataConfig, part: str) -> DatasetInfo:
        return DatasetInfo(path=Path(part), num_samples=3, classes=classes[part])

    monkeypatch.setattr(evaluation, "dataset_info", dataset_info)
    values = {"name": "x", "model": {"name": "deit"}, "data": {"train": "a", "val": "b"}}
    with pytest.raises(ConfigError, match=r"^data\.val: expected the classes of train") as caught:
        evaluation.check_data(RunConfig.model_validate(values))
    assert str(caught.value).endswith(message)


def scores_of(logits: torch.Tensor, labels: list[int], **more: Any) -> dict[str, float]:
    """Of two batches; the last image of each only fills it."""
    ranks: Any = SimpleNamespace(device=torch.device("cpu"), all_reduce_sum=lambda values: values)
    valid = torch.tensor([True] * (len(labels) - 1) + [False])
    batches = [(logits, torch.tensor(labels), valid) for _ in range(2)]
    return evaluation.evaluate(torch.nn.Identity(), batches, lambda x: x, ranks, **more)


@pytest.mark.parametrize("classes", [3, 5, 6])
def test_top_5_is_of_more_than_five_classes(classes: int) -> None:
    logits = -torch.arange(classes).repeat(3, 1)  # class 0 first, class 5 sixth
    scores = scores_of(logits, [0, classes - 1, 0])
    assert (scores["top1"], scores["images"]) == (50, 4)
    text = f"top-1 50.00 %, loss {scores['loss']:.4f} on 4 images"
    if classes == 6:
        assert scores["top5"] == 50
        text = text.replace(", loss", ", top-5 50.00 %, loss")
    else:
        assert "top5" not in scores
    assert evaluation.describe(scores) == text


def test_a_confusion_matrix_counts_valid_images_of_one_evaluation() -> None:
    logits = torch.eye(3)[[0, 0, 2, 1]]
    confusion = torch.full((3, 3), 7.0, dtype=torch.float64)  # of the evaluation before
    scores_of(logits, [0, 1, 2, 0], confusion=confusion)
    assert confusion.tolist() == [[2, 0, 0], [2, 0, 0], [0, 0, 2]]
