"""Accuracy and loss over a validation set, every image counted once on any number of ranks."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from irpe_ds.checkpoint.reader import WEIGHTS, SavedWeights
from irpe_ds.cluster.heartbeat import Heartbeat
from irpe_ds.cluster.process_group import (
    Ranks,
    destroy_process_group,
    init_process_group,
    set_environment,
)
from irpe_ds.cluster.waiting import Waiting
from irpe_ds.config import RunConfig
from irpe_ds.data.loaders import EvalLoader
from irpe_ds.models.build import build_deferred, load_weights, saved_positions
from irpe_ds.models.positions import Positions
from irpe_ds.models.pretrained import local_file
from irpe_ds.training.batch import Normalize
from irpe_ds.training.datasets import open_checked, with_class_count
from irpe_ds.training.deepspeed_config import read_ds_config
from irpe_ds.training.engine import FirstValues, build_evaluation_model
from irpe_ds.training.engine_state import load_tensors

EvalBatch = tuple[Tensor, Tensor, Tensor]
"""Images, labels and which of them are valid."""
IGNORED = -100
"""Label of an image that is not counted: no class, so never a hit."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    prepare: Callable[[Tensor], Tensor],
    ranks: Ranks,
    confusion: Tensor | None = None,
) -> dict[str, float]:
    """Top-1 and, of more than five classes, top-5 (per cent), mean cross-entropy, and images.

    Args:
        batches: (images, labels, valid) of this rank. Images that are not valid are padding, which
            keeps the number of forward passes equal on all ranks, as ZeRO-3 needs.
        prepare: turns uint8 images into the model's input.
        confusion: (C, C) float64 on the device of the ranks; becomes the number of images by class
            and predicted class.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    classes = 0
    if confusion is not None:
        confusion.zero_()
    for images, labels, valid in batches:
        labels = labels.masked_fill_(~valid, IGNORED).to(ranks.device, non_blocking=True)
        logits = model(prepare(images)).float()
        classes = logits.shape[1]
        best = logits.topk(min(5, classes)).indices
        hits = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        totals[:3] += torch.stack([hits[:, :1].sum(), hits.sum(), loss])
        totals[3] += valid.sum()
        if confusion is not None:
            counted = (labels != IGNORED).to(confusion.dtype)
            confusion.index_put_((labels.clamp(min=0), best[:, 0]), counted, accumulate=True)
    model.train(was_training)
    if confusion is not None:
        ranks.all_reduce_sum(confusion)
    top1, top5, loss_sum, count = ranks.all_reduce_sum(totals).tolist()
    scores = {"top1": 100 * top1 / count, "loss": loss_sum / count, "images": count}
    return scores if classes <= 5 else {"top1": scores["top1"], "top5": 100 * top5 / count} | scores


def describe(scores: Mapping[str, float]) -> str:
    """Scores in words."""
    top5 = f", top-5 {scores['top5']:.2f} %" if "top5" in scores else ""
    loss, images = scores["loss"], scores["images"]
    return f"top-1 {scores['top1']:.2f} %{top5}, loss {loss:.4f} on {images:.0f} images"


def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Set BatchNorm's running statistics to their means over the ranks, which saw other images.

    What is evaluated, and logged, is then the model of the checkpoint; all ranks call it.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
    if ranks.world_size == 1 or not statistics:
        return
    means = ranks.all_reduce_sum(torch.cat([s.flatten().float() for s in statistics]))
    means /= ranks.world_size
    for own, mean in zip(statistics, means.split([s.numel() for s in statistics]), strict=True):
        own.copy_(mean.view_as(own))


def evaluate_weights(
    config: RunConfig, weights: Path | SavedWeights, batch_size: int
) -> dict[str, float] | None:
    """Scores of weights in fp32 with a run's configuration; None on all ranks but rank 0.

    If train.deepspeed has stage 3, several ranks hold a partition of each weight.

    Args:
        batch_size: images of one forward pass of one rank.

    Raises:
        UserError: the data or the weights do not match the configuration.
    """
    set_environment()
    config = with_class_count(config, "val")
    open_checked(config, "val")
    model, initial = build_deferred(config.model.without_weights(), config.seed)
    is_its_own = (
        isinstance(weights, SavedWeights)
        and weights.fits(model)
        and saved_positions(weights) == Positions.of(model)
    )
    if not is_its_own:
        path = local_file(weights, "--weights") if isinstance(weights, Path) else weights
        load_weights(model, path, where="--weights", initial=initial)
    ranks = init_process_group(config.train.join_seconds)
    with Heartbeat(ranks), Waiting("evaluation", ranks.is_main):
        batches = EvalLoader(
            config.data,
            batch_size=batch_size,
            img_size=config.model.img_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        normalize = Normalize(config.data, ranks.device)
        section = read_ds_config(config.train.deepspeed)["zero_optimization"]
        first_values = FirstValues(model, initial, ranks.device)
        placed = build_evaluation_model(model, section, ranks)
        if isinstance(weights, SavedWeights) and is_its_own:
            load_tensors(model, weights)
        else:
            load_tensors(model, first_values, f"{WEIGHTS}.")
        scores = evaluate(placed, batches, normalize, ranks)
    destroy_process_group()
    return scores if ranks.is_main else None
