"""The training loop."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from irpe_ds.checkpoint import reader
from irpe_ds.checkpoint.writer import CheckpointWriter
from irpe_ds.cluster.preemption import PreemptionSync
from irpe_ds.cluster.process_group import Ranks
from irpe_ds.cluster.waiting import Waiting
from irpe_ds.config import RunConfig
from irpe_ds.data.loaders import Batch, EvalLoader, TrainLoader
from irpe_ds.data.order import train_order
from irpe_ds.errors import CheckpointError, TrainingError
from irpe_ds.models import flops
from irpe_ds.models.deferred import Initial
from irpe_ds.runlog import RunLog
from irpe_ds.training import precision
from irpe_ds.training.batch import Inputs, Normalize, seed_step
from irpe_ds.training.compilation import compile_engine
from irpe_ds.training.engine import FirstValues, build_engine
from irpe_ds.training.engine_state import EngineState
from irpe_ds.training.evaluation import EvalBatch, average_statistics, describe, evaluate
from irpe_ds.training.intervals import Recurrence
from irpe_ds.training.loss import Loss
from irpe_ds.training.metrics import Meter
from irpe_ds.training.optim import build_schedule, ema_decay_at
from irpe_ds.training.start import LOCK, RunLength, Start
from irpe_ds.training.trace import Trace

SKIPPED = "skipped.jsonl"
"""File of the run folder: the updates that were skipped, and the samples of each."""


class Stopped(Exception):
    """A rank received a stop signal."""


class Trainer:
    """A model in a DeepSpeed engine with its data: trains, evaluates, saves and resumes.

    Args:
        manifest: the run's checkpoint manifest before its first update.
        start: where training starts.
        model, initial: of `build_deferred`.
        ds_config: DeepSpeed's configuration.
        preemption: checked after every update and every batch of an evaluation.
        waiting: is told what is being done.
    """

    def __init__(
        self,
        config: RunConfig,
        length: RunLength,
        manifest: reader.CheckpointManifest,
        start: Start,
        model: nn.Module,
        initial: Initial,
        loss: Loss,
        ds_config: dict[str, Any],
        ranks: Ranks,
        preemption: PreemptionSync,
        waiting: Waiting,
    ) -> None:
        self.config, self.length, self.ranks = config, length, ranks
        self.preemption, self.stop, self.waiting = preemption, preemption.signals, waiting
        self.manifest, self.folder = manifest, config.folder / reader.FOLDER
        self.loss = loss.to(ranks.device)
        self.dtype = precision.MODEL[config.train.precision]
        shared: dict[str, Any] = {
            "batch_size": ds_config["train_micro_batch_size_per_gpu"],
            "img_size": config.model.img_size,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
        }
        count = config.train.accumulation
        self.train_batches = TrainLoader(
            config.data, config.augment, seed=config.seed, accumulation=count, **shared
        )
        self.val_batches = EvalLoader(config.data, **shared)
        self.setup_engine(start, model, initial, ds_config)
        self.schedule = build_schedule(self.engine.optimizer, config, length.updates_per_epoch)
        self.normalize = Normalize(config.data, ranks.device)
        self.train_inputs = Inputs(config, ranks.device)
        self.lock = self.find_lock()
        own = start.path is not None and start.path.resolve().parent == self.folder.resolve()
        self.writer = CheckpointWriter(self.folder, ranks, config.train.keep_checkpoints)
        self.last_checkpoint = start.saved if own else manifest
        """Manifest of this run's newest checkpoint on disk."""
        self.update = start.saved.update
        recurrence = partial(
            Recurrence,
            updates_per_epoch=length.updates_per_epoch,
            log_every=config.train.log_every,
            ranks=ranks,
        )
        self.evaluations = recurrence(config.train.eval_every)
        self.checkpoints = recurrence(config.train.save_every)
        is_last = self.update == length.last_update
        self.evaluation_due = self.update > 0 and (
            is_last or self.evaluations.falls_on(self.update)
        )
        self.skips = 0
        """Updates skipped in a row because of gradients that are not finite."""
        self.trace = Trace(config.train.profile, config.folder, ranks)
        self.confusion: Tensor | None = None
        """What evaluations count by class and predicted class, if anything."""
        self.on_scored: Callable[[Path], None] = lambda checkpoint: None
        """Called on every rank with a checkpoint that has its scores."""
        self.meter = Meter(ranks, start.saved.meter)
        self.flops = flops.TRAINING * flops.forward_flops(config.model)

    def setup_engine(
        self, start: Start, model: nn.Module, initial: Initial, ds_config: dict[str, Any]
    ) -> None:
        """Wrap the model in a DeepSpeed engine, in the state that training starts with."""
        config, device = self.config, self.ranks.device
        first_values = FirstValues(model, initial, device)
        self.engine, self.gradient_sums = build_engine(model, config, ds_config, device)
        self.state = EngineState(self.engine, ema=config.train.ema_decay is not None)
        if start.path is None:
            self.state.load(first_values)
        else:
            files = reader.open_files(start.path, self.ranks.rank / self.ranks.world_size)
            self.state.load(files, start.saved.steps)
            self.state.set_loss_scaler(start.saved.loss_scaler)
        if config.train.compile:
            compile_engine(self.engine)

    def fit(self, log: RunLog) -> bool:
        """Train to the last update or until a signal; whether the last update was reached."""
        try:
            if self.last_checkpoint.update != self.update:  # started from another run's
                self.save(log)
            while True:
                if self.evaluation_due and not self.is_scored():
                    self.add_scores(log, self.validate(log))
                self.evaluation_due = False
                if self.update == self.length.last_update:
                    return True
                self.train_epoch(log)
        except Stopped:
            self.finish_save()
            if self.last_checkpoint.update != self.update:
                self.save(log)
                self.finish_save()
            self.stop.finished = True
            signal = self.stop.received or "a signal to another rank"
            rerun = "rerun with --resume auto to continue"
            log.note(f"stopped by {signal} after update {self.update}; {rerun}")
            return False

    def find_lock(self) -> tuple[int, int] | None:
        """Device and inode of the run folder's locked file, on rank 0; None if it is not there."""
        try:
            found = (self.config.folder / LOCK).stat() if self.ranks.is_main else None
        except OSError:
            found = None
        return found and (found.st_dev, found.st_ino)

    def check_folder(self) -> None:
        """Check that what is written can be found: the kernel lets a deleted file be written to.

        Raises:
            CheckpointError: on rank 0, if the run folder was deleted, moved or replaced.
        """
        if self.find_lock() != self.lock:
            folder = self.config.folder
            raise CheckpointError(f"{folder}: the run folder was deleted or moved under the run")

    def is_scored(self) -> bool:
        """Whether the checkpoint of the current update has the results of its evaluation."""
        return self.last_checkpoint.update == self.update and bool(self.last_checkpoint.scores)

    def raise_if_stopped(self) -> None:
        """Raise Stopped on all ranks once one of them has received a signal."""
        if self.preemption.reached():
            raise Stopped

    def train_epoch(self, log: RunLog) -> None:
        """Train to the end of the epoch, the last update, or until an evaluation is due."""
        train = self.config.train
        epoch, done = divmod(self.update, self.length.updates_per_epoch)
        end = min(self.length.last_update, (epoch + 1) * self.length.updates_per_epoch)
        size = self.config.model.size_at(epoch)
        first_pass = done * train.accumulation
        batches = self.train_batches.epoch(epoch, first_pass, img_size=size)
        with closing(batches), self.progress_bar(epoch, done) as bar:
            self.meter.start_clock()
            while self.update < end and not self.evaluation_due:
                self.train_update(batches, log)
                bar.update()
                if self.update % train.log_every == 0 or self.update == end:
                    self.check_folder()
                    row = self.log_row(self.meter.read())
                    log.log("train", self.update, row)
                    bar.set_postfix_str(
                        f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, "
                        f"{row['images_per_s']:.0f} img/s"
                    )
                is_last = self.update == self.length.last_update
                self.evaluation_due = is_last or self.evaluations.is_due(self.update)
                if self.evaluation_due or self.checkpoints.is_due(self.update):
                    self.save(log)
                self.raise_if_stopped()

    def progress_bar(self, epoch: int, done: int) -> tqdm:
        """Updates of this epoch, on rank 0; a redirected log gets a line every 30 seconds."""
        return tqdm(
            total=self.length.updates_per_epoch,
            initial=done,
            desc=f"epoch {epoch + 1}/{self.config.train.epochs}",
            unit="update",
            disable=not self.ranks.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            leave=sys.stderr.isatty(),
        )

    def train_update(self, batches: Iterator[Batch], log: RunLog) -> None:
        """All forward and backward passes of one update, and the optimizer step."""
        self.waiting.next(f"update {self.update + 1}")
        self.schedule.step_update(self.update)
        self.engine.basic_optimizer.ema_decay = ema_decay_at(self.config.train, self.update)
        for micro_step in range(self.config.train.accumulation):
            batch = self.next_batch(batches)
            self.meter.add(self.step(batch, micro_step), len(batch.images))
        self.update += 1
        self.meter.updates += 1
        if self.engine.was_step_applied():
            self.skips = 0
        elif not self.state.loss_scale_can_drop():
            self.record_skip(log)
        self.trace.step()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch of this rank.

        A launcher that signals whole trees of processes may end a worker of the timm pipeline
        before the rank has noticed the signal: that is a stop, not an error. Of several ranks one
        alone cannot stop: they end with the error, and continue from the newest checkpoint.
        """
        try:
            return self.meter.wait(batches)
        except RuntimeError:  # "DataLoader worker exited unexpectedly"
            time.sleep(1)  # signals to a tree do not arrive at once
            if self.ranks.world_size > 1 or not self.stop.received:
                raise
            raise Stopped from None

    def step(self, batch: Batch, micro_step: int) -> Tensor:
        """One forward and backward pass, with the update if it is its last; returns the loss."""
        step = self.update * self.config.train.accumulation + micro_step
        seed_step(self.config.seed, step, self.ranks.rank)
        images, targets = self.inputs(batch)
        loss = self.loss(images, self.engine(images), targets)
        if self.gradient_sums is not None:
            self.gradient_sums.is_last = micro_step + 1 == self.config.train.accumulation
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch as the model takes it, in its dtype."""
        images, targets = self.train_inputs(batch)
        return images.to(self.dtype), targets

    def record_skip(self, log: RunLog) -> None:
        """Record the samples of an update that was skipped; fail after too many in a row.

        Raises:
            TrainingError: on all ranks, since all see the same reduced gradients.
        """
        self.skips += 1
        limit = self.config.train.max_skips
        path = self.config.folder / SKIPPED
        if self.ranks.is_main:
            row = {"update": self.update, "samples": self.samples_of(self.update)}
            log.append(SKIPPED, json.dumps(row))
            log.note(f"update {self.update} skipped: a gradient is not finite; see {path}")
        if self.skips > limit:
            self.finish_save()
            raise TrainingError(
                f"{self.skips} updates in a row, up to {self.update}, had gradients that are not "
                f"finite (train.max_skips is {limit}); their samples are in {path}, and the last "
                f"checkpoint is of update {self.last_checkpoint.update}"
            )

    def samples_of(self, update: int) -> list[int]:
        """The samples of an update over all ranks; updates count from 1."""
        epoch, done = divmod(update - 1, self.length.updates_per_epoch)
        images = self.config.train.global_batch
        order = train_order(
            self.length.num_samples,
            batch_size=images,
            accumulation=1,
            rank=0,
            world_size=1,
            seed=self.config.seed,
            epoch=epoch,
            repeats=self.config.augment.repeats,
            window=self.config.data.mixed,
        )
        return order.samples[done * images : (done + 1) * images].tolist()

    def log_row(self, row: dict[str, float]) -> dict[str, float]:
        """The meter's row with the engine's numbers and the share of the hardware's FLOPs."""
        row["lr"] = max(group["lr"] for group in self.engine.optimizer.param_groups)
        row["epoch"] = self.update / self.length.updates_per_epoch
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            row["grad_norm"] = float(norm)
        if self.config.train.precision == "fp16":
            row["loss_scale"] = self.engine.optimizer.cur_scale
        rate = self.flops * row["images_per_s"] / self.ranks.world_size
        row["tflops"] = rate / 1e12
        peak = flops.peak_flops(self.ranks.device)
        if peak is not None:
            row["mfu"] = rate / peak
        return row

    def validate(self, log: RunLog) -> dict[str, float]:
        """Scores of the current weights, and of their average, on the whole validation set."""
        self.waiting.next("evaluation")
        average_statistics(self.engine.module, self.ranks)
        scores = self.evaluate(self.engine)
        ema_text = ""
        if self.config.train.ema_decay is not None:
            with self.state.average():
                average = self.evaluate(self.engine)
            scores |= {f"ema_{key}": average[key] for key in scores if key != "images"}
            ema_text = f"; EMA: top-1 {scores['ema_top1']:.2f} %"
        epoch = self.update / self.length.updates_per_epoch
        log.log("eval", self.update, {"epoch": epoch, **scores})
        log.note(f"epoch {epoch:g}: {describe(scores)}{ema_text}")
        return scores

    def evaluate(self, model: Any) -> dict[str, float]:
        """Scores of one model; raises Stopped between batches."""

        def batches() -> Iterator[EvalBatch]:
            for batch in self.val_batches:
                self.raise_if_stopped()
                yield batch

        return evaluate(
            model, batches(), lambda x: self.normalize(x).to(self.dtype), self.ranks, self.confusion
        )

    def save(self, log: RunLog) -> None:
        """Begin to write a checkpoint of the current update; all ranks call it.

        Training stands still while the checkpoint before is being finished and the state copied.
        """
        self.finish_save()
        self.check_folder()
        log.sync()  # a checkpoint's rows are on disk before it
        manifest = self.manifest.at(
            self.update,
            steps=self.state.steps(),
            loss_scaler=self.state.loss_scaler(),
            meter=self.meter.save(),
            constants=self.state.constant_shapes(),
            ema=self.config.train.ema_decay is not None,
        )
        average_statistics(self.engine.module, self.ranks)
        shards = self.state.copy_shards(self.ranks.rank, self.ranks.world_size)
        self.writer.start(manifest, shards)

    def finish_save(self) -> None:
        """Wait until the checkpoint that is being written is on disk."""
        self.waiting.next("writing a checkpoint")
        self.last_checkpoint = self.writer.finish() or self.last_checkpoint

    def add_scores(self, log: RunLog, scores: dict[str, float]) -> None:
        """Add the scores of the newest checkpoint to its manifest."""
        self.finish_save()
        log.sync()
        manifest = replace(self.last_checkpoint, scores=scores)
        write = partial(reader.add_scores, self.folder, manifest)
        self.last_checkpoint = self.ranks.on_rank0(write)
        self.on_scored(reader.path_of(self.folder, self.update))
