"""Build the model of a run's `model` section, and load weights from a file."""

import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from irpe_ds.checkpoint.reader import (
    MANIFEST,
    CheckpointManifest,
    SavedWeights,
    find_damage,
    read_manifest,
)
from irpe_ds.config import ModelConfig, validate
from irpe_ds.errors import CheckpointError, ConfigError, UserError
from irpe_ds.models.create import (
    arguments,
    check_name,
    check_options,
    create,
    explained,
    first_line,
    meta_model,
    no_download,
    own_weights_key,
)
from irpe_ds.models.deferred import Initial, defer, materialize
from irpe_ds.models.positions import Positions, check_encoding, check_grid, on_grid
from irpe_ds.models.pretrained import check_hub, local_file, released
from irpe_ds.models.weights_file import check_tensors, read_weights
from irpe_ds.models.zoo import RELEASED_CLASSES, ZOO

logger = logging.getLogger(__name__)


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
    check_name(config.name)
    if own_weights_key(config) and "pretrained_cfg_overlay" not in config.options:
        try:
            check_hub(getattr(timm.models.get_pretrained_cfg(config.name), "hf_hub_id", None))
        except OSError as error:
            raise no_download(config, error) from None
    make = partial(create, config, arguments(config))
    model, initial = explained(config, partial(defer, make, seed))
    if config.options:
        check_options(config)
    if config.weights is not None:
        renewed = _classifier(model) if config.new_head else ()
        hint = "model.new_head=true reinitialises the classifier"
        path = local_file(config.weights, "model.weights")
        load_weights(model, path, "model.weights", renewed, hint, initial)
    elif config.pretrained and config.name in ZOO:
        path, same = released(config.name), config.num_classes == RELEASED_CLASSES
        renewed = () if same else _classifier(model)  # as timm does
        load_weights(model, path, "model.pretrained", renewed, initial=initial)
    return model, initial


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

    Position embeddings are interpolated to the model's grid, from the one that the weights are of;
    relative position tables are indexed by offsets, which no resize changes, and are loaded
    unchanged, if they are of the same encoding. If the file has none, as a plain DeiT's, the tables
    stay zero and a warning is logged. EMA weights of a timm training checkpoint are preferred.

    Args:
        path: a file, or the folder of a checkpoint.
        renewed: tensors that keep their present values instead of the file's.
        hint: what the user can do about a file with other classes.
        initial: of a model of `build_deferred`, to get the weights in place of the model; those of
            a .safetensors file are read when the parameter is.

    Raises:
        ConfigError: an unreadable file, the weights of another model or of another encoding, or
            weights of which the grid is unknown.
        CheckpointError: the checkpoint is damaged.
    """
    expected = model.state_dict()
    state, stated = _read(model, path, where)
    state |= {key: expected[key] for key in renewed}
    state = _fitted(model, state, stated, where, path)
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
    check_tensors(state, expected, where, path)
    if initial is None:
        model.load_state_dict(state)
        return
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = state.pop(name)
        if not value.is_meta:  # else the model's own, which keeps its first value
            initial.replace(name, value, parameter.dtype)
    model.load_state_dict(state, strict=False)  # buffers


def _read(
    model: nn.Module, path: Path | SavedWeights, where: str
) -> tuple[dict[str, Any], Positions | None]:
    """The state dict of weights, and what they say of positions."""
    if isinstance(path, Path) and path.is_dir():
        if not (path / MANIFEST).exists():
            raise ConfigError(where, f"a file, or a checkpoint's folder with {MANIFEST}", path)
        if damage := find_damage(path):
            raise CheckpointError(f"{where}: {path}: damaged checkpoint: {damage}")
        path = SavedWeights(path)
    if isinstance(path, SavedWeights):
        return dict(path), saved_positions(path)
    try:
        return read_weights(path)
    except FileNotFoundError:
        raise ConfigError(where, "a checkpoint file", f"nothing at {path}") from None
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # torch raises any type for a corrupt or foreign file
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(
            where, _readable(model), f"{path}: {reason or first_line(error)}"
        ) from None


def _fitted(
    model: nn.Module, state: dict[str, Any], stated: Positions | None, where: str, path: object
) -> dict[str, Any]:
    """The state dict by the model's names and on its grid, if it is of the same encoding."""
    expected = model.state_dict()
    embedding = {key: state[key] for key in ("pos_embed",) if key in state and key in expected}
    check_tensors(embedding, expected, where, path)  # before it is interpolated
    try:
        if stated is not None:
            check_encoding(Positions.of(model), stated)
        if isinstance(model, vision_transformer.VisionTransformer | eva.Eva):
            return _for_vit(model, expected, state, stated)
        if stated is not None:
            check_grid(model, stated)
        return state
    except UserError as error:
        raise ConfigError(where, error.expected, f"{path} with {error.got}") from None
    except Exception as error:  # timm raises any type for a foreign file
        raise ConfigError(where, _readable(model), f"{path}: {first_line(error)}") from None


def _readable(model: nn.Module) -> str:
    return f"a readable checkpoint of this {type(model).__name__}"


def _for_vit(
    model: vision_transformer.VisionTransformer | eva.Eva,
    expected: dict[str, Tensor],
    state: dict[str, Any],
    stated: Positions | None,
) -> dict[str, Any]:
    """The state dict by timm's names, its position embedding on the model's grid."""
    ours, theirs = ({k for k in names if "lookup_table" not in k} for names in (expected, state))
    source = eva if isinstance(model, eva.Eva) else vision_transformer
    if ours != theirs:
        return source.checkpoint_filter_fn(state, model)  # perhaps another program's names
    own = {}
    if model.pos_embed is not None:
        grid = None if stated is None else stated.grid
        own["pos_embed"] = on_grid(model, state.pop("pos_embed"), grid)
    if _first_difference(expected, state | own):
        state = source.checkpoint_filter_fn(state, model)  # patch embeddings of another size
    return state | own


def saved_positions(weights: SavedWeights) -> Positions | None:
    """What the manifest of a checkpoint says; None if its configuration is not valid any more."""
    return _positions_in(read_manifest(weights.path))


def _positions_in(manifest: CheckpointManifest) -> Positions | None:
    try:
        config = validate(ModelConfig, manifest.config.get("model", {}))
    except UserError:
        return None
    return Positions.of(meta_model(config))


def check_positions(path: Path, saved: CheckpointManifest, config: ModelConfig) -> None:
    """Check what shapes do not tell: whether a run of this configuration can resume from there.

    Raises:
        CheckpointError: the grid or the encoding is another.
    """
    if saved.config.get("model") == config.model_dump(mode="json"):
        return
    there, model = _positions_in(saved), meta_model(config)
    if there is None:
        return
    try:
        check_encoding(Positions.of(model), there)
        check_grid(model, there)
    except UserError as error:
        raise CheckpointError(path, error.expected, error.got) from None


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
