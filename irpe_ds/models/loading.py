"""`irpe_ds.load`: a trained model with its transform and its classes, from a run or an export."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from irpe_ds.checkpoint import reader
from irpe_ds.checkpoint.manifest import EMA
from irpe_ds.checkpoint.reader import SavedWeights
from irpe_ds.checkpoint.shards import whole_shapes
from irpe_ds.config import ModelConfig, load_run_config
from irpe_ds.data.rgb import to_rgb
from irpe_ds.errors import CheckpointError, UserError
from irpe_ds.files import read_regular
from irpe_ds.models.build import build_deferred, load_weights
from irpe_ds.models.create import meta_model
from irpe_ds.models.deferred import materialize
from irpe_ds.models.exported import LIMIT, Images, read_exported
from irpe_ds.models.positions import Positions, check_encoding
from irpe_ds.models.zoo import WEIGHTS
from irpe_ds.rpe.buckets import TOKENS
from irpe_ds.schema import parse_json

CLASSES = "classes.json"
"""Of a run folder: the names of the classes, a JSON list."""


class Transform:
    """A PIL image -> (3, H, W) normalised float32, as validation with pipeline `timm` does it."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self._timm: Any = create_transform(
            images.input_size,
            is_training=False,
            interpolation=images.interpolation,
            crop_pct=images.crop_pct,
            mean=images.mean,
            std=images.std,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self._timm(to_rgb(image))
        return pixels


class Loaded(NamedTuple):
    """What `load` returns."""

    model: nn.Module
    """On the CPU, for evaluation."""
    transform: Transform
    classes: tuple[str, ...] | None
    """The names of the classes in the order of the logits; None: the file does not say."""


def load(path: str | Path) -> Loaded:
    """A model with the transform of its validation and its classes; without trusting the files.

    Args:
        path: a run folder, of which the best checkpoint is taken, and its moving average if it has
            one; or what `launch/export.py --out` wrote: a folder, or a .safetensors file.

    Raises:
        UserError: it is none of these or is damaged, or the weights are of another encoding.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        return _of_run(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _of_export(path)
    expected = "a run folder, an exported folder or an exported .safetensors file"
    raise CheckpointError("load", expected, path if path.exists() else f"nothing at {path}")


def run_weights(run: Path) -> SavedWeights:
    """The weights of a run that scored best: of its moving average if it keeps one.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
    """
    weights = reader.weights_of(run, best=True)
    averaged = any(key.startswith(f"{EMA}.") for key in weights.files.shapes)
    return SavedWeights(weights.path, ema=True) if averaged else weights


def run_classes(run: Path, number: int) -> tuple[str, ...] | None:
    """The names of a run's classes; None if it has not kept them, as older versions.

    Raises:
        CheckpointError: the file is not readable, or has not this number of names.
    """
    path = run / CLASSES
    try:
        names = parse_json(read_regular(path, LIMIT), tuple[str, ...], path, CheckpointError)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(names) != number:
        raise CheckpointError(path, f"{number} names, as model.num_classes", len(names))
    return names


def _of_run(run: Path) -> Loaded:
    config = load_run_config(run)
    model = _with_weights(config.model.without_weights(), run_weights(run), str(run))
    return Loaded(model, Transform(Images.of(config)), run_classes(run, config.model.class_count))


def _of_export(path: Path) -> Loaded:
    said = read_exported(path)
    file = path / WEIGHTS if path.is_dir() else path
    try:
        config = said.model()
        _check_size(config, {name: [*shape] for name, shape in whole_shapes([file], {}).items()})
        check_encoding(Positions.of(meta_model(config)), said.irpe.positions)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from None
    model = _with_weights(config, file, str(path))
    return Loaded(model, Transform(said.pretrained_cfg), said.label_names)


def _with_weights(config: ModelConfig, weights: Path | SavedWeights, where: str) -> nn.Module:
    model, initial = build_deferred(config, seed=0)
    load_weights(model, weights, where, initial=initial)
    return materialize(model, initial, "cpu").eval()


def _check_size(config: ModelConfig, shapes: dict[str, list[int]]) -> None:
    """Raise CheckpointError before memory is taken, unless the model has a file's tensors alone."""
    with _at_most(2 * len(shapes)):
        model = meta_model(config)
    rows, columns = Positions.of(model).grid or (1, 1)
    if rows * columns > TOKENS:
        raise CheckpointError("input_size", f"at most {TOKENS} patches", rows * columns)
    expected = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    for name in {**expected, **shapes}:
        if expected.get(name) != shapes.get(name):
            got = f"{name} of shape {shapes.get(name)}, not {expected.get(name)}"
            raise CheckpointError("model_args", "the model of these weights", got)


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """While entered, no more parameters can be made: a file says how many its model has."""
    numbers = count()

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and next(numbers) >= parameters:
            raise CheckpointError("model_args", "a model of the tensors in its file", "more")

    register: Any = register_module_parameter_registration_hook
    hook = register(check)
    try:
        yield
    finally:
        hook.remove()
