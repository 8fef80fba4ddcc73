"""config.json of an export, in timm's layout: the model, its images and classes, its origin.

timm reads it for `local-dir:` and `hf-hub:` names; our own part, `irpe`, is beside timm's keys. A
single .safetensors file has the same text in its metadata.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from safetensors import safe_open
from torch import nn

from irpe_ds.config import ModelConfig, RunConfig, validate
from irpe_ds.config_types import Count, Positive
from irpe_ds.errors import CheckpointError
from irpe_ds.files import open_regular, read_regular
from irpe_ds.models.create import arguments
from irpe_ds.models.positions import Positions
from irpe_ds.models.zoo import EQUIPPED
from irpe_ds.schema import Number, Plain, parse_json

CONFIG = "config.json"
"""Its name in an export, and the key of a file's metadata."""
LIMIT = 16 << 20
"""Largest config.json that is read, bytes."""
LARGEST = 1 << 16
"""Largest integer that an argument of a model may be: what loops to it ends."""
REFUSED = ("cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
"""Arguments with which timm would read another file."""


def _small(value: Any) -> Any:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _small(item)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise PydanticCustomError("size", f"integers up to {LARGEST}")
    return value


Side = Annotated[int, Field(strict=True, gt=0, le=4096)]
Arguments = Annotated[dict[str, Plain], AfterValidator(_small)]


@dataclass(frozen=True, kw_only=True)
class Images:
    """timm's pretrained_cfg: what the model takes for an image."""

    input_size: tuple[Literal[3], Side, Side]
    interpolation: Literal["bicubic", "bilinear"]
    crop_pct: Annotated[float, Field(strict=True, ge=0.1, le=1)]
    mean: tuple[Number, Number, Number]
    std: tuple[Positive, Positive, Positive]

    @classmethod
    def of(cls, config: RunConfig) -> "Images":
        """Those of a run's validation with pipeline `timm`; `ffcv` resizes by area."""
        data = config.data
        return cls(
            input_size=(3, *config.model.img_size),
            interpolation="bicubic",
            crop_pct=data.val_crop,
            mean=data.mean,
            std=data.std,
        )


@dataclass(frozen=True, kw_only=True)
class Own:
    """Our part: what the tables mean, and where the weights come from."""

    positions: Positions
    origin: dict[str, Plain]
    """Run, checkpoint, commit and versions."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What is read of config.json; timm reads more of it."""

    __pydantic_config__ = pydantic.ConfigDict(arbitrary_types_allowed=True)

    architecture: str
    num_classes: Count
    model_args: Arguments
    pretrained_cfg: Images
    irpe: Own
    label_names: tuple[str, ...] | None = None

    def model(self) -> ModelConfig:
        """The model's section of a configuration.

        Raises:
            UserError: an argument is missing, or is none of a model's own.
        """
        options = dict(self.model_args)
        name, rpe = self.architecture, None
        if name == EQUIPPED:
            name, rpe = options.pop("base", None), options.pop("rpe", None)
        for key in ("num_classes", "img_size"):
            options.pop(key, None)
        if wrong := [key for key in REFUSED if key in options]:
            raise CheckpointError("model_args", "arguments of a model alone", wrong[0])
        values = {"name": name, "rpe": rpe, "num_classes": self.num_classes, "options": options}
        return validate(ModelConfig, values | {"img_size": self.pretrained_cfg.input_size[1:]})


def read_exported(path: Path) -> Exported:
    """What an export says of itself: the folder's config.json, or the metadata of a file.

    Raises:
        CheckpointError: it is no export, or is damaged; of one line.
    """
    try:
        where = path / CONFIG if path.is_dir() else path
        text = read_regular(where, LIMIT) if path.is_dir() else _metadata(path)
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from None
    exported = parse_json(text, Exported, where, CheckpointError)
    names = exported.label_names
    if names is not None and len(names) != exported.num_classes:
        expected = f"{exported.num_classes}, the number of classes"
        raise CheckpointError(f"{where}: label_names", expected, len(names))
    return exported


def _metadata(path: Path) -> str:
    with open_regular(path):
        pass
    try:
        with safe_open(path, "pt") as file:
            text: str | None = (file.metadata() or {}).get(CONFIG)
    except Exception as error:  # safetensors raises a type of its own
        raise CheckpointError(path, "a .safetensors file", error) from None
    if text is None:
        expected = "a file that says its model, as launch/export.py writes it"
        raise CheckpointError(path, expected, f"one without {CONFIG} in its metadata")
    return text


def describe(
    config: RunConfig,
    model: nn.Module,
    classes: tuple[str, ...] | None,
    origin: dict[str, Any],
    license: str | None = None,
) -> str:
    """config.json of a run's weights.

    Args:
        model: the run's, on any device.
        classes: the names of the classes, if the run knows them.
        origin: where the weights come from.
        license: of the weights.
    """
    name, args = architecture(config.model)
    known: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    kept = ("fixed_input_size", "first_conv", "classifier")
    said: dict[str, Any] = {
        "architecture": name,
        "num_classes": config.model.num_classes,
        "num_features": getattr(model, "num_features", None),
        "model_args": args,
        "pretrained_cfg": {
            **asdict(Images.of(config)),
            "num_classes": config.model.num_classes,
            **{key: known[key] for key in kept if key in known},
        },
        "irpe": {"positions": asdict(Positions.of(model)), "origin": origin},
    }
    if license is not None:
        said["pretrained_cfg"]["license"] = license
    if classes is not None:
        said["label_names"] = classes
    return json.dumps(said, indent=2) + "\n"


def architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The name and the arguments with which timm.create_model makes the model, for evaluation."""
    fixed = {"drop_path": 0.0, "resolutions": (), "impl": "auto"}
    args = arguments(config.without_weights().model_copy(update=fixed))
    args.pop("impl", None)
    name, _, _ = config.name.partition(".")  # the rest is timm's tag of other weights
    if config.rpe is None:
        return name, args
    return EQUIPPED, {"base": name, "rpe": asdict(config.rpe), **args}
