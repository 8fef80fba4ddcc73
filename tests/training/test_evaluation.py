"""Scores of an evaluation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from irpe_ds.training import evaluation


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
