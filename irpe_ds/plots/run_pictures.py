"""What W&B and TensorBoard get of a run beside numbers: pictures, scores by class, checkpoints.

matplotlib is imported where something is drawn: a run does not need it.
"""

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch
from torch import Tensor

from irpe_ds.checkpoint import reader
from irpe_ds.config import RunConfig
from irpe_ds.data.pipelines.pipeline import dataset_info
from irpe_ds.runlog import RunLog
from irpe_ds.training.batch import seed_step
from irpe_ds.training.trainer import Trainer

MOST_CLASSES = 1000
"""Of a confusion matrix."""
TABLE_IMAGES = 16
"""Images of data.val over which a picture of the tables is a mean."""


def fit(trainer: Trainer, log: RunLog) -> bool:
    """`Trainer.fit`, sending what the section `log` of the configuration asks for.

    None of it ends a run: what cannot be drawn or read is a line of the log.
    """
    if not trainer.ranks.on_rank0(lambda: log.has_sinks):
        return trainer.fit(log)
    config, count = trainer.config, trainer.config.model.class_count
    if config.log.confusion and count <= MOST_CLASSES:
        device = trainer.ranks.device
        trainer.confusion = torch.zeros(count, count, dtype=torch.float64, device=device)
    if not trainer.ranks.is_main:
        return trainer.fit(log)
    if config.log.images and trainer.update < trainer.length.last_update:
        _attempt(log, "picture of the inputs", partial(send_inputs, trainer, log))
    trainer.on_scored = OnScored(trainer, log)
    finished = trainer.fit(log)
    confusion = trainer.confusion
    if finished and confusion is not None:
        classes = partial(send_classes, config, log, trainer.update, confusion)
        _attempt(log, "confusion matrix", classes)
    if finished and config.log.wandb.artifacts == "best":
        _attempt(log, "best checkpoint", partial(send_best, config, log))
    return finished


def _attempt(log: RunLog, what: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # whatever it is, the run is worth more
        log.note(f"no {what}: {type(error).__name__}: {error}")


class OnScored:
    """Sends the tables, and checkpoints if all are wanted, of evaluated checkpoints."""

    def __init__(self, trainer: Trainer, log: RunLog) -> None:
        self._trainer, self._log = trainer, log
        self._drawn = self._periods()

    def __call__(self, checkpoint: Path) -> None:
        config, update = self._trainer.config, self._trainer.update
        if self._periods() > self._drawn:
            self._drawn = self._periods()
            tables = partial(send_tables, config, self._log, update, checkpoint)
            _attempt(self._log, "picture of the tables", tables)
        if config.log.wandb.artifacts == "all":
            _attempt(self._log, "checkpoint", partial(send_checkpoint, self._log, checkpoint, []))

    def _periods(self) -> int:
        """Pictures of the tables that are due up to now."""
        every, length = self._trainer.config.log.tables_every, self._trainer.length
        return self._trainer.update // (every * length.updates_per_epoch) if every else 0


def class_names(config: RunConfig) -> list[str]:
    """Names of the classes, or numbers where the data set has none."""
    known = dataset_info(config.data, "val").classes
    return [*known] if known else [str(n) for n in range(config.model.class_count)]


def send_inputs(trainer: Trainer, log: RunLog) -> None:
    """Send the first images of rank 0's next batch as the model will see them."""
    from irpe_ds.plots.classes import draw_images, label_texts, unnormalized
    from irpe_ds.plots.style import pixels

    config, length = trainer.config, trainer.length
    epoch, done = divmod(trainer.update, length.updates_per_epoch)
    first_pass, size = done * config.train.accumulation, config.model.size_at(epoch)
    with closing(trainer.train_batches.epoch(epoch, first_pass, img_size=size)) as batches:
        batch = next(batches)
    seed_step(config.seed, trainer.update * config.train.accumulation, trainer.ranks.rank)
    images, targets = trainer.inputs(batch)
    count = config.log.images
    shown = unnormalized(images[:count], config.data)
    picture = pixels(draw_images(shown, label_texts(targets[:count].cpu(), class_names(config))))
    log.send(methodcaller("picture", "inputs", trainer.update, picture))


def send_tables(config: RunConfig, log: RunLog, update: int, checkpoint: Path) -> None:
    """Send a picture of the tables on keys, on queries and on values, as far as there are any."""
    from irpe_ds.plots.style import pixels
    from irpe_ds.plots.tables import draw_tables, read_maps

    # On the CPU, where the run's own implementation may not run.
    model = config.model.model_copy(update={"impl": "reference"})
    config = config.model_copy(update={"model": model})
    weights = reader.SavedWeights(checkpoint)
    for target in model.rpe.on if model.rpe else "":
        on, maps, inert = read_maps(config, weights, target, None, TABLE_IMAGES)
        picture = pixels(draw_tables(maps, on, f"{config.name}, update {update}", inert))
        log.send(methodcaller("picture", f"tables/{on}", update, picture))


def send_classes(config: RunConfig, log: RunLog, update: int, confusion: Tensor) -> None:
    """Send the confusion matrix, a picture, and each class's scores, a table."""
    from irpe_ds.plots.predictions import draw_confusion
    from irpe_ds.plots.style import pixels
    from irpe_ds.prediction import Scores

    scores, names = Scores(confusion.cpu().long().numpy()), class_names(config)
    picture = pixels(draw_confusion(scores, names, config.name))
    rows = [{"class": name, **scores.of_class(n)} for n, name in enumerate(names)]
    log.send(methodcaller("picture", "confusion", update, picture))
    log.send(methodcaller("table", "classes", update, rows))


def send_best(config: RunConfig, log: RunLog) -> None:
    paths = reader.complete(config.folder / reader.FOLDER)
    send_checkpoint(log, reader.best_of(paths), ["best"])


def send_checkpoint(log: RunLog, path: Path, aliases: list[str]) -> None:
    """Send a checkpoint with its scores; W&B's thread copies and uploads it."""
    manifest = reader.read_manifest(path)
    scores = {key: value for key, value in manifest.scores.items() if math.isfinite(value)}
    aliases = [f"update-{manifest.update}", *aliases]
    log.send(methodcaller("checkpoint", path, manifest.update, scores, aliases))
