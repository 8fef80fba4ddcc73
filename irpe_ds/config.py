"""The run's configuration: one YAML and `section.key=value` overrides -> a frozen RunConfig."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import pydantic
import yaml
from pydantic import (
    Field,
)

from irpe_ds.config_file import read_values
from irpe_ds.config_sections import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    Section,
    TrainConfig,
)
from irpe_ds.config_types import (
    Natural,
)
from irpe_ds.errors import ConfigError, UserError

Checked = TypeVar("Checked", bound=Section)


class RunConfig(Section):
    """Everything that a training run depends on; kept in the run folder as config.yaml."""

    name: Annotated[str, Field(pattern=r"^[\w.-]*\w[\w.-]*$")]
    """Name of the run and of its folder: letters, digits and . _ - only."""
    output: Path = Path("runs")
    """Folder that holds the run folder."""
    seed: Natural = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    log: LogConfig = LogConfig()

    @pydantic.model_validator(mode="after")
    def _warmup_ends(self) -> "RunConfig":
        if self.optim.warmup_epochs >= self.train.epochs:
            expected = f"less than train.epochs, which is {self.train.epochs}, such as 0"
            raise ConfigError("optim.warmup_epochs", expected, self.optim.warmup_epochs)
        return self

    @pydantic.model_validator(mode="after")
    def _bce_has_labels(self) -> "RunConfig":
        smoothing = self.augment.label_smoothing
        if self.train.loss == "bce" and smoothing:
            raise ConfigError("augment.label_smoothing", "0 with train.loss bce", smoothing)
        return self

    @property
    def folder(self) -> Path:
        """The run folder, output/name."""
        return self.output / self.name

    def dump(self) -> str:
        """The resolved configuration as YAML that `load_config` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML on its bases, apply overrides such as `train.epochs=3` in order, and validate.

    Raises:
        ConfigError: a file cannot be read, or a key is unknown, missing or of the wrong type.
    """
    return validate(RunConfig, read_values(Path(path), overrides))


def load_run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run folder keeps, for the scripts' --run.

    Raises:
        ConfigError: there is no such folder; and as `load_config`.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError("--run", "a run folder, which holds config.yaml", folder)
    return load_config(path, overrides)


def validate(section: type[Checked], values: dict[str, Any], where: str = "") -> Checked:
    """The section that has these values; `where` it stands in the whole, if not at the top.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type.
    """
    try:
        return section.model_validate(values)
    except pydantic.ValidationError as error:
        mistakes = [_explain(finding, section, where) for finding in error.errors()]
    if len(mistakes) == 1:
        raise mistakes[0]
    raise ConfigError(
        "\n  ".join([f"{len(mistakes)} mistakes in the configuration:", *map(str, mistakes)])
    )


def _explain(finding: Any, section: type[Section], above: str) -> ConfigError:
    """One of pydantic's findings, in our words."""
    keys = [str(part) for part in finding["loc"]]
    where = ".".join([*([above] if above else []), *keys])
    if finding["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_beside(section, keys)
        close = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return ConfigError(where, f"one of the keys {', '.join(known)}", f"an unknown key{hint}")
    if finding["type"].startswith("missing"):
        return ConfigError(where, "a value", "nothing: the key is required")
    cause = finding.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # RPEConfig names its field, other validators leave it out
        parts = [str(part) for part in (where, cause.where) if part]
        return ConfigError(".".join(parts), cause.expected, cause.got)
    expected = finding["msg"].removeprefix("Input should be ")
    if finding["type"] == "string_pattern_mismatch":  # of the run's name, the only one
        expected = "letters, digits, and . _ -"
    elif finding["type"] == "dataclass_type":
        expected = (
            f"null or a section with the keys {', '.join(_keys_beside(section, [*keys, '']))}"
        )
    return ConfigError(where, expected[0].lower() + expected[1:], repr(finding["input"]))


def _keys_beside(section: Any, keys: list[str]) -> list[str]:
    """The keys that the section of this unknown key does have."""
    for key in keys[:-1]:
        annotation = section.model_fields[key].annotation
        section = next((a for a in get_args(annotation) if a is not type(None)), annotation)
    return list(getattr(section, "model_fields", None) or section.__dataclass_fields__)
