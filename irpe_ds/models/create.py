"""timm's model of a run's `model` section, with relative position; its weights are its own."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.models.freezing import freeze
from irpe_ds.models.vision_transformer import check_resolution, equip, fit_encoder
from irpe_ds.models.zoo import ZOO

Made = TypeVar("Made")
OWN_FIELDS = {"num_classes", "img_size", "drop_path_rate", "impl", "checkpoint_path"}
"""Arguments of timm.create_model that have a key of their own in `model`."""


def meta_model(config: ModelConfig) -> nn.Module:
    """The model on the meta device for evaluation, its attention in eager PyTorch, to count or ask.

    Raises:
        ConfigError: as `build_model`.
    """
    check_name(config.name)
    plain = config.without_weights().model_copy(update={"impl": "auto"})
    with torch.device("meta"):
        model = explained(plain, partial(create, plain, arguments(plain)))
    for module in model.modules():
        if isinstance(module, RPEAttention):
            module.impl = "reference"
    return model.eval()


def check_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError("model.name", "a timm model name", f"{name!r}{hint}")


def explained(config: ModelConfig, make: Callable[[], Made]) -> Made:
    """What `make` returns; timm 1.0 raises any type for an argument that it does not accept."""
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        if own_weights_key(config) and isinstance(error, OSError):
            raise no_download(config, error) from None
        got = f"{arguments(config)}: {first_line(error)}"
        raise ConfigError("model", f"arguments that {config.name} accepts", got) from None


def own_weights_key(config: ModelConfig) -> str | None:
    """Which key makes timm load weights of its own, if one does."""
    if config.options.get("pretrained"):
        return "model.options.pretrained"
    return "model.pretrained" if config.pretrained and config.name not in ZOO else None


def no_download(config: ModelConfig, error: OSError) -> ConfigError:
    key = own_weights_key(config)
    expected = f"a network, {key}=false to start anew, or model.weights=FILE of {config.name}"
    return ConfigError(key, expected, first_line(error))


def check_options(config: ModelConfig) -> None:
    """Raise ConfigError unless the model makes logits of images in three channels."""
    height, width = config.img_size
    expected = f"options with which {config.name} classifies RGB images of {height}x{width} pixels"
    try:
        with torch.device("meta"), torch.no_grad():
            logits = meta_model(config)(torch.empty(1, 3, height, width))
    except UserError:
        raise
    except Exception as error:  # of any type: the models are timm's
        raise ConfigError("model.options", expected, first_line(error)) from None
    if getattr(logits, "shape", None) != (1, config.class_count):
        got = f"outputs {tuple(getattr(logits, 'shape', ()))}, not {(1, config.class_count)}"
        raise ConfigError("model.options", expected, got)


def create(config: ModelConfig, arguments: dict[str, Any]) -> nn.Module:
    """timm's model, with relative position."""
    model: Any
    try:
        model = timm.create_model(config.name, **arguments)
    except UserError as error:
        raise ConfigError(f"model.{error.where}", error.expected, error.got) from None
    fit_encoder(model, config.img_size)
    if config.rpe is not None:
        try:
            model = equip(model, config.rpe, config.impl)
        except UserError as error:
            where = "model.impl" if error.where == "impl" else "model.rpe"
            raise ConfigError(where, error.expected, error.got) from None
    elif config.impl != "auto" and config.name not in ZOO:
        raise ConfigError("model.impl", "auto for a model without relative position", config.impl)
    freeze(model, config.freeze)
    for size in (*((pixels, pixels) for _, pixels in config.resolutions), config.img_size):
        try:
            check_resolution(model, size)
        except UserError as error:
            raise ConfigError("model.resolutions", error.expected, error.got) from None
    if config.grad_checkpointing:
        try:
            recompute_blocks(model, config.grad_checkpointing)
        except UserError as error:
            what = "activation checkpointing" if error.expected == "false" else "a choice of blocks"
            expected = f"{error.expected}: {config.name} does not support {what}"
            raise ConfigError("model.grad_checkpointing", expected, error.got) from None
    return model


def recompute_blocks(model: Any, every: int) -> None:
    """Compute activations again in the backward pass: those of every n-th block, or with 0 none.

    1 is timm's own activation checkpointing, of all blocks. More begins with the first block, and
    stores the activations of those between.

    Raises:
        ConfigError: the model does not support it.
    """
    blocks = getattr(model, "blocks", ())
    for block in blocks:
        vars(block).pop("forward", None)
    try:
        model.set_grad_checkpointing(every == 1)
    except (AssertionError, AttributeError):  # how timm 1.0 says that a model does not support it
        raise ConfigError("grad_checkpointing", "false", "true") from None
    if every > 1 and not blocks:
        raise ConfigError("grad_checkpointing", "true or false", every)
    for block in blocks[::every] if every > 1 else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def arguments(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of timm.create_model."""
    twice = OWN_FIELDS & config.options.keys()
    if twice:
        expected = "no argument with a key of its own in `model`"
        raise ConfigError("model.options", expected, ", ".join(sorted(twice)))
    arguments = {"num_classes": config.class_count, **config.options}
    name, _, _ = config.name.partition(".")  # the rest is timm's tag of the weights
    pretrained = timm.models.get_pretrained_cfg(name)
    if pretrained is None or pretrained.fixed_input_size:
        arguments["img_size"] = config.img_size
        if config.resolutions:
            arguments["dynamic_img_size"] = True
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    if config.name in ZOO:
        arguments["impl"] = config.impl
    elif config.pretrained:
        arguments["pretrained"] = True
    return arguments


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
