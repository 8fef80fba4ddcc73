"""DeepSpeed's configuration: ZeRO and communication from a JSON, the rest from the YAML."""

import json
from typing import Any

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError

OWNED_BY_YAML = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optim.clip_grad",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim",
    "wandb": "log.wandb",
    "tensorboard": "log.tensorboard",
}
"""Keys of DeepSpeed's that the JSON must not set, and the YAML key that does."""


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for this run on so many ranks.

    Raises:
        ConfigError: the JSON cannot be read or sets one of the YAML's numbers, or the batch does
            not divide among ranks and accumulation steps.
    """
    train = config.train
    settings = _read_json(config)
    for key, owner in OWNED_BY_YAML.items():
        if key in settings:
            got = f"{key}: {json.dumps(settings[key])}"
            raise ConfigError(train.deepspeed, f"no {key!r}: {owner} in the YAML sets it", got)
    settings |= {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optim.clip_grad or 0.0,
        "steps_per_print": 2**31,  # the run log prints
    }
    if train.precision != "fp32":
        settings[train.precision] = {"enabled": True}
    return settings


def micro_batch(config: RunConfig, world_size: int) -> int:
    """Images of one forward pass of one rank.

    Raises:
        ConfigError: the global batch does not divide evenly, or mixing needs an even number.
    """
    train = config.train
    parts = world_size * train.accumulation
    if train.global_batch % parts:
        expected = f"a multiple of ranks x accumulation = {world_size} x {train.accumulation}"
        raise ConfigError("train.global_batch", expected, train.global_batch)
    images = train.global_batch // parts
    if images % 2 and (config.augment.mixup or config.augment.cutmix):
        expected = f"an even number of images per rank with mixup or cutmix ({parts} parts)"
        raise ConfigError("train.global_batch", expected, f"{train.global_batch}, {images} each")
    return images


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that the run's JSON asks for."""
    return _read_json(config)["zero_optimization"]["stage"]


def _read_json(config: RunConfig) -> dict[str, Any]:
    path = config.train.deepspeed
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        got = f"{path}: {error.strerror}"
        raise ConfigError("train.deepspeed", "a readable JSON file", got) from None
    except ValueError as error:
        raise ConfigError(path, "valid JSON", error) from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise ConfigError(path, "zero_optimization.stage of 0, 1, 2 or 3", zero)
    return settings
