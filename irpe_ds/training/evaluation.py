"""Accuracy and loss over a validation set, every image counted once on any number of ranks."""

from collections.abc import Callable, Iterable
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
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.data.loaders import EvalLoader
from irpe_ds.data.pipelines.pipeline import Part, dataset_info
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_deferred, load_weights, saved_positions
from irpe_ds.models.positions import Positions
from irpe_ds.models.pretrained import local_file
from irpe_ds.training.batch import Normalize
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
) -> dict[str, float]:
    """Top-1 and top-5 (per cent), mean cross-entropy and the number of images.

    Args:
        batches: (images, labels, valid) of this rank. Images that are not valid are padding, which
            keeps the number of forward passes equal on all ranks, as ZeRO-3 needs.
        prepare: turns uint8 images into the model's input.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for images, labels, valid in batches:
        labels = labels.masked_fill_(~valid, IGNORED).to(ranks.device, non_blocking=True)
        logits = model(prepare(images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        totals[:3] += torch.stack([hits[:, :1].sum(), hits.sum(), loss])
        totals[3] += valid.sum()
    model.train(was_training)
    top1, top5, loss_sum, count = ranks.all_reduce_sum(totals).tolist()
    return {
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "loss": loss_sum / count,
        "images": count,
    }


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


def check_data(config: RunConfig) -> dict[str, DatasetInfo]:
    """What data.train and data.val hold, after checking that both are complete and fit the model.

    Raises:
        UserError: one does not; the message names the configuration key.
    """
    train, val = dataset_info(config.data, "train"), dataset_info(config.data, "val")
    if train.classes and val.classes and train.classes != val.classes:
        missing, more = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
        got = ", ".join(
            f"{word} {_few(names)}"
            for word, names in (("without", missing), ("with", more))
            if names
        )
        got = f"others: {got}" if got else "another order"
        raise ConfigError("data.val", f"the classes of {train.path}", got)
    _check_classes(config, "train", train)
    _check_classes(config, "val", val)
    return {"train": train, "val": val}


def _few(names: set[str]) -> str:
    shown = [repr(name) for name in sorted(names)[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_checked(config: RunConfig, part: Part) -> DatasetInfo:
    """What data.train or data.val holds, after checking that it is complete and fits the model."""
    info = dataset_info(config.data, part)
    _check_classes(config, part, info)
    return info


def _check_classes(config: RunConfig, part: Part, info: DatasetInfo) -> None:
    path, num_classes = getattr(config.data, part), config.model.num_classes
    if info.num_classes not in (None, num_classes):
        expected = f"{info.num_classes}, the classes of {path}"
        raise ConfigError("model.num_classes", expected, num_classes)
    if info.num_classes is None and info.largest_label is not None:  # no manifest
        largest, sample = info.largest_label
        if largest >= num_classes:
            expected = f"more than {largest}, the label of sample {sample} of {path}"
            raise ConfigError("model.num_classes", expected, num_classes)
