"""A run from its configuration: check everything, build, train, keep the record."""

from functools import partial

import torch

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model
from irpe_ds.runlog import RunLog
from irpe_ds.training import checkpoint
from irpe_ds.training.agreement import check_agreement
from irpe_ds.training.deepspeed_config import deepspeed_config
from irpe_ds.training.distributed import device_type, join, launched, set_environment
from irpe_ds.training.evaluation import check_data
from irpe_ds.training.heartbeat import Heartbeat
from irpe_ds.training.loss import build_loss
from irpe_ds.training.plan import make_plan
from irpe_ds.training.record import attention_op, write_record
from irpe_ds.training.start import FolderLock, check_folder, find_start, first_model
from irpe_ds.training.stop import StopSignals
from irpe_ds.training.trainer import Trainer


def train(config: RunConfig, resume: str = "never") -> bool:
    """Train a run to its end, or until a signal asks it to stop; whether it is at its end.

    Args:
        resume: `never`, `auto` (go on from the newest undamaged checkpoint of the run folder, or
            start if there is none), or the folder of one checkpoint.

    Raises:
        ConfigError: a mistake in the configuration or the data.
        TrainingError: gradients are not finite any more.
    """
    set_environment()
    _, world_size = launched()
    settings = deepspeed_config(config, world_size)
    data = check_data(config)
    plan = make_plan(config, data["train"].num_samples)
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.tf32
    torch.manual_seed(config.seed)
    model = build_model(first_model(config, resume))
    loss = build_loss(config)
    loss.prepare(model)
    op = attention_op(config, model, device_type())
    manifest = checkpoint.describe(config, settings, plan, model, world_size, op._asdict())

    ranks = join()
    with StopSignals() as stop, Heartbeat(ranks):
        check_agreement(ranks, config, data, op)
        start = ranks.from_first(partial(find_start, config, resume, manifest))
        if start.path is not None and ranks.any(not start.path.exists()):
            expected = "a run folder that all nodes share"
            raise ConfigError(config.folder, expected, f"no {start.path} on one of them")
        saved = start.saved
        if saved.update > plan.last_update or (saved.update == plan.last_update and saved.scores):
            if ranks.is_first:
                done = f"{config.folder} is trained already, {saved.update} updates"
                print(f"{done}; name=... starts another")
            return True
        check_folder(config)
        with FolderLock(config.folder, ranks):
            trainer = Trainer(config, plan, manifest, start, model, loss, settings, ranks, stop)
            with RunLog(
                config.folder,
                active=ranks.is_first,
                name=config.name,
                config=config.model_dump(mode="json"),
                wandb=config.log.wandb.model_dump(),
                tensorboard=config.log.tensorboard,
                resume_update=None if resume == "never" else saved.update,
                again=() if saved.scores else ("eval",),
            ) as log:
                if ranks.is_first:
                    log.note(write_record(config, settings, ranks, op))
                for text in start.notes:
                    log.note(text)
                return trainer.fit(log)
