"""From the `model` section of a run's configuration to a model, and from a file to its weights."""

import difflib
from pathlib import Path

import timm
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.vision_transformer import equip


def build_model(config: ModelConfig) -> nn.Module:
    """Any timm model by name, equipped with relative position when the section asks for it.

    Raises:
        ConfigError: no such model, an argument it does not take, or weights of another model.
    """
    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError("model.name", "a timm model name", f"{config.name!r}{hint}")
    options = {"num_classes": config.num_classes, **config.options}
    pretrained = timm.models.get_pretrained_cfg(config.name)
    if pretrained is None or pretrained.fixed_input_size:
        options["img_size"] = config.img_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        model = timm.create_model(config.name, **options)
    except (TypeError, AssertionError) as error:
        raise ConfigError("model.options", f"arguments that {config.name} takes", error) from None
    if config.rpe is not None:
        model = equip(model, config.rpe, config.impl)
    if config.weights is not None:
        load_weights(model, config.weights, where="model.weights")
    return model


def load_weights(model: nn.Module, path: Path, where: str) -> None:
    """Load a checkpoint: .safetensors, or .pth such as the released `{"model": ..., "args": ...}`.

    Position embeddings are interpolated to the model's grid; relative position tables belong to
    offsets, not to places, and are loaded as they are. Pickles are read with weights_only=True.

    Raises:
        ConfigError: the file cannot be read, or holds the weights of another model.
    """
    try:
        state = load_state_dict(str(path))
    except FileNotFoundError:
        raise ConfigError(where, "a checkpoint file", f"nothing at {path}") from None
    except Exception as error:  # torch and safetensors raise many kinds for a file that is broken
        reason = str(error).splitlines()[0]
        raise ConfigError(where, "a readable checkpoint", f"{path}: {reason}") from None
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)
    difference = _first_difference(model.state_dict(), state)
    if difference:
        raise ConfigError(where, f"the weights of this {type(model).__name__}", difference)
    model.load_state_dict(state)


def _first_difference(expected: dict[str, Tensor], got: dict[str, Tensor]) -> str | None:
    for key in expected.keys() | got.keys():
        if key not in got:
            return f"no tensor {key}"
        if key not in expected:
            return f"an extra tensor {key}"
        if expected[key].shape != got[key].shape:
            shapes = f"{tuple(got[key].shape)}, not {tuple(expected[key].shape)}"
            return f"{key} of shape {shapes}"
    return None
