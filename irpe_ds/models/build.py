"""Build the model of a run's `model` section, and load weights from a file."""

import difflib
import logging
from argparse import Namespace
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irpe_ds.checkpoint.reader import SavedWeights
from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.models.deferred import Initial, defer, materialize
from irpe_ds.models.vision_transformer import equip, set_resolution
from irpe_ds.models.zoo import ZOO

logger = logging.getLogger(__name__)
OWN_FIELDS = {"num_classes", "img_size", "drop_path_rate", "impl"}
"""Arguments of timm.create_model that have a key of their own in `model`."""


def build_model(config: ModelConfig) -> nn.Module:
    """Any timm model by name, with relative position if `model.rpe` is set.

    Its first values are those of `build_deferred`, with a seed from PyTorch's generator.

    Raises:
        ConfigError: an unknown model, an argument it does not accept, or weights that do not fit.
    """
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    return materialize(*build_deferred(config, seed))


def build_deferred(config: ModelConfig, seed: int) -> tuple[nn.Module, Initial]:
    """The model of `build_model` with parameters on the meta device, and their first values.

    At no moment are there values of the whole model, but for those models of timm that compute in
    Python with their parameters while they are built. Weights of a .safetensors file are read
    when the parameter is.

    Raises:
        ConfigError: as `build_model`.
    """
    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError("model.name", "a timm model name", f"{config.name!r}{hint}")
    arguments = _arguments(config)
    try:
        model, initial = defer(partial(_create, config, arguments), seed)
    except UserError:
        raise
    except Exception as error:  # timm 1.0 raises any type for an argument it does not accept
        got = f"{arguments}: {_first_line(error)}"
        raise ConfigError("model", f"arguments that {config.name} accepts", got) from None
    if config.weights is not None:
        renewed = _classifier(model) if config.new_head else ()
        hint = "model.new_head=true reinitialises the classifier"
        load_weights(model, config.weights, "model.weights", renewed, hint, initial)
    return model, initial


def _create(config: ModelConfig, arguments: dict[str, Any]) -> nn.Module:
    """timm's model, with relative position, at the last of its resolutions."""
    model: Any
    try:
        model = timm.create_model(config.name, **arguments)
    except UserError as error:
        raise ConfigError(f"model.{error.where}", error.expected, error.got) from None
    if config.rpe is not None:
        try:
            model = equip(model, config.rpe, config.impl)
        except UserError as error:
            where = "model.impl" if error.where == "impl" else "model.rpe"
            raise ConfigError(where, error.expected, error.got) from None
    elif config.impl != "auto" and config.name not in ZOO:
        raise ConfigError("model.impl", "auto for a model without relative position", config.impl)
    progressive = [(pixels, pixels) for _, pixels in config.resolutions]
    for size in (*progressive, config.img_size):  # the last one stays
        try:
            set_resolution(model, size)
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


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of timm.create_model."""
    twice = OWN_FIELDS & config.options.keys()
    if twice:
        expected = "no argument with a key of its own in `model`"
        raise ConfigError("model.options", expected, ", ".join(sorted(twice)))
    arguments = {"num_classes": config.num_classes, **config.options}
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
    return arguments


def _classifier(model: Any) -> tuple[str, ...]:
    """Names of the tensors of the classifier, which is two layers in a distilled DeiT."""
    names = model.pretrained_cfg["classifier"]
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(key for key in model.state_dict() if key.rpartition(".")[0] in names)


def load_weights(
    model: nn.Module,
    path: Path | SavedWeights,
    where: str,
    renewed: Collection[str] = (),
    hint: str = "",
    initial: Initial | None = None,
) -> None:
    """Load .safetensors, .pth such as the released `{"model": ..., "args": ...}`, or a checkpoint.

    Position embeddings are interpolated to the model's grid; relative position tables are indexed
    by offsets, which no resize changes, and are loaded unchanged. If the file has none, as a plain
    DeiT's, the tables stay zero and a warning is logged. EMA weights of a timm training checkpoint
    are preferred. Pickles are read with weights_only=True.

    Args:
        renewed: tensors that keep their present values instead of the file's.
        hint: what the user can do about a file with other classes.
        initial: of a model of `build_deferred`, to get the weights in place of the model; those of
            a .safetensors file are read when the parameter is.

    Raises:
        ConfigError: an unreadable file, or the weights of another model.
    """
    expected = model.state_dict()
    try:
        # Not timm's defaults in 1.0.24: pickles run no code, and released files, with a Namespace,
        # load. Drop both when the lower bound of setup.py has them (test_code_in_a_pickle...).
        with torch.serialization.safe_globals([Namespace]):
            if isinstance(path, SavedWeights):
                state = dict(path)
            else:
                state = load_state_dict(str(path), weights_only=True)
        state |= {key: expected[key] for key in renewed}
        if isinstance(model, VisionTransformer) and _first_difference(expected, state):
            state = checkpoint_filter_fn(state, model)
    except FileNotFoundError:
        raise ConfigError(where, "a checkpoint file", f"nothing at {path}") from None
    except Exception as error:  # torch raises any type for a corrupt or foreign file
        fits = f"a readable checkpoint of this {type(model).__name__}"
        raise ConfigError(where, fits, f"{path}: {_first_line(error)}") from None
    if not any("lookup_table" in key for key in state):
        tables = {key: value for key, value in expected.items() if "lookup_table" in key}
        if tables:
            logger.warning("%s has no relative position tables: they start at zero", path)
        state = state | tables
    if renewed:
        logger.warning("%s: not loaded, initialised anew: %s", path, ", ".join(renewed))
    difference = _first_difference(expected, state)
    if difference:
        key, what = difference
        got = f"{path} with {what}"
        if hint and key in _classifier(model):
            got = f"{got} ({hint})"
        raise ConfigError(where, f"the weights of this {type(model).__name__}", got)
    if initial is None:
        model.load_state_dict(state)
        return
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = state.pop(name)
        if not value.is_meta:  # else the model's own, which keeps its first value
            initial.replace(name, value, parameter.dtype)
    model.load_state_dict(state, strict=False)  # buffers


def _first_difference(expected: dict[str, Tensor], got: dict[str, Any]) -> tuple[str, str] | None:
    """The first key whose tensor is missing, extra or of another shape, and which of these."""
    for key in (*expected, *(key for key in got if key not in expected)):
        if key not in got:
            return key, f"no tensor {key}"
        if key not in expected:
            return key, f"an unexpected tensor {key}"
        shape = getattr(got[key], "shape", None)
        if shape != expected[key].shape:
            return key, f"{key} of shape {tuple(shape or ())}, not {tuple(expected[key].shape)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
