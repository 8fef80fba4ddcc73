"""The training loop."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from irpe_ds.config import RunConfig
from irpe_ds.data.augment import Erase
from irpe_ds.data.loaders import Batch, EvalLoader, TrainLoader
from irpe_ds.models.vision_transformer import set_resolution
from irpe_ds.runlog import RunLog
from irpe_ds.training import checkpoint
from irpe_ds.training.batch import Normalize, build_augment, build_mixup, seed_step
from irpe_ds.training.distributed import Ranks
from irpe_ds.training.evaluation import evaluate
from irpe_ds.training.optim import build_optimizer, build_schedule
from irpe_ds.training.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """One model under DeepSpeed with its data: trains epochs, evaluates, saves, resumes."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        manifest: checkpoint.Manifest,
        model: nn.Module,
        settings: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        import deepspeed

        self.config, self.plan, self.manifest, self.ranks = config, plan, manifest, ranks
        shared: dict[str, Any] = {
            "batch_size": settings["train_micro_batch_size_per_gpu"],
            "img_size": config.model.img_size,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "pipeline": config.data.pipeline,
            "workers": config.data.workers,
        }
        self.train_batches = TrainLoader(
            config.data.train,
            augment=config.augment,
            seed=config.seed,
            accumulation=config.train.accumulation,
            mean=config.data.mean,
            **shared,
        )
        self.val_batches = EvalLoader(config.data.val, crop=config.data.val_crop, **shared)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, config), config=settings
        )
        self.schedule = build_schedule(self.engine.optimizer, config, plan.updates_per_epoch)
        self.augment = build_augment(config)
        self.normalize = Normalize(config.data, ranks.device)
        self.erase = Erase(config.augment.erase)
        self.mixup = build_mixup(config)
        self.update = 0

    def fit(self, log: RunLog) -> None:
        """Train to the last update, with evaluation and a checkpoint after every epoch."""
        while self.update < self.plan.last_update:
            self.train_epoch(log)
            self.validate(log)
            self.save()

    def train_epoch(self, log: RunLog) -> None:
        """Train from the present update to the end of its epoch, or to the last update."""
        epoch, done = divmod(self.update, self.plan.updates_per_epoch)
        end = min(self.plan.last_update, (epoch + 1) * self.plan.updates_per_epoch)
        accumulation = self.config.train.accumulation
        size = self.config.model.size_at(epoch)
        set_resolution(self.engine.module, size)
        batches = self.train_batches.epoch(epoch, first_pass=done * accumulation, img_size=size)
        with closing(batches), self.progress_bar(epoch, done) as bar:
            meter = Meter(batches, self.ranks)
            while self.update < end:
                self.schedule.step_update(self.update)
                for micro_step in range(accumulation):
                    batch = next(meter)
                    meter.add(self.step(batch, micro_step), len(batch.images))
                self.update += 1
                bar.update()
                if self.update % self.config.train.log_every == 0 or self.update == end:
                    row = self.report(meter.read())
                    log.log("train", self.update, row)
                    if not math.isfinite(row["loss"]):
                        raise FloatingPointError(
                            f"the loss of update {self.update} is {row['loss']}"
                        )
                    bar.set_postfix_str(
                        f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, "
                        f"{row['images_per_s']:.0f} img/s"
                    )

    def progress_bar(self, epoch: int, done: int) -> tqdm:
        """Updates of this epoch, on rank 0; a redirected log gets a line now and then."""
        return tqdm(
            total=self.plan.updates_per_epoch,
            initial=done,
            desc=f"epoch {epoch + 1}/{self.config.train.epochs}",
            unit="update",
            disable=not self.ranks.is_first,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            leave=sys.stderr.isatty(),
        )

    def step(self, batch: Batch, micro_step: int) -> Tensor:
        """One forward and backward pass, the last of an update with the update; the loss."""
        number = self.update * self.config.train.accumulation + micro_step
        seed_step(self.config.seed, number, self.ranks.rank)
        images = batch.images.to(self.ranks.device, non_blocking=True)
        images = self.erase(self.normalize(self.augment(images, batch.keys)), batch.keys)
        targets = batch.labels.to(self.ranks.device, non_blocking=True)
        smoothing = self.config.augment.label_smoothing
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)  # smoothed by mixup
            smoothing = 0.0
        logits = self.engine(images.to(DTYPES[self.config.train.precision]))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def report(self, row: dict[str, float]) -> dict[str, float]:
        """The meter's row with what the engine knows."""
        row["lr"] = self.engine.optimizer.param_groups[0]["lr"]
        row["epoch"] = self.update / self.plan.updates_per_epoch
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            row["grad_norm"] = float(norm)
        if self.config.train.precision == "fp16":
            row["loss_scale"] = self.engine.optimizer.cur_scale
        if self.ranks.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return row

    def validate(self, log: RunLog) -> None:
        """Evaluate the present weights on the whole validation set."""
        dtype = DTYPES[self.config.train.precision]
        set_resolution(self.engine.module, self.config.model.img_size)
        scores = evaluate(
            self.engine, self.val_batches, lambda x: self.normalize(x).to(dtype), self.ranks
        )
        epoch = self.update / self.plan.updates_per_epoch
        log.log("eval", self.update, {"epoch": epoch, **scores})
        log.note(
            f"epoch {epoch:g}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, "
            f"loss {scores['loss']:.4f} on {scores['images']:.0f} images"
        )

    def save(self) -> None:
        """Write a checkpoint of the present update."""
        folder = self.config.folder / checkpoint.FOLDER
        manifest = self.manifest.at(self.update)
        checkpoint.save(
            self.engine, folder, manifest, self.ranks, keep=self.config.train.keep_checkpoints
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.update = checkpoint.resume(self.engine, path)


class Meter(Iterator[Batch]):
    """Passes batches on and keeps the loss, the speed and the share of time spent waiting.

    The loss is summed on the device; only `read` waits for it.
    """

    def __init__(self, batches: Iterable[Batch], ranks: Ranks) -> None:
        self.batches, self.ranks = iter(batches), ranks
        self.reset()

    def reset(self) -> None:
        self.loss = torch.zeros((), device=self.ranks.device)
        self.passes = self.images = 0
        self.waited, self.since = 0.0, time.perf_counter()

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - started
        return batch

    def add(self, loss: Tensor, images: int) -> None:
        self.loss += loss
        self.passes += 1
        self.images += images

    def read(self) -> dict[str, float]:
        """Means since the last reading, over all ranks; starts anew."""
        loss = self.ranks.sum(self.loss).item() / (self.passes * self.ranks.world_size)
        seconds = time.perf_counter() - self.since
        row = {
            "loss": loss,
            "images_per_s": self.images * self.ranks.world_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self.reset()
        return row
