"""The options of a conversion, checked before anything heavy is imported."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from irpe_ds.errors import ConfigError

Mode = Literal["passthrough", "transcode", "reencode", "raw", "proportion"]
Check = Literal["decode", "header"]
OnBad = Literal["error", "skip"]
ClassLevel = Literal["top", "leaf"]
OtherClasses = Literal["error", "skip"]

MAX_BAD = 0.01
"""Share of the images that may be skipped."""
_MAX_SHARDS = 512  # a process that reads the set keeps all of them open, of 1,024 files mostly


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How images are stored; the defaults keep every RGB or grey JPEG as it is.

    Raises:
        ConfigError: a value is out of range, or does not go with another one.
    """

    mode: Mode = "passthrough"
    """`passthrough`: the bytes of an RGB or grey JPEG, and the pixels of any other image.
    `transcode`: the same pixels, but JPEGs are coded anew, so that crops of them decode faster.
    `reencode`: JPEG, compressed again. `raw`: pixels. `proportion`: JPEG for a random share of
    the images, pixels for the others."""
    longest_side: int | None = None
    """Pixels; images with a longer side are reduced to it, by area. None: not reduced."""
    shortest_side: int | None = None
    """Pixels; the same for the shorter side."""
    quality: int = 90
    """Quality of newly compressed JPEGs."""
    proportion: float = 0.5
    """Share of JPEGs in mode `proportion`."""
    check: Check = "decode"
    """`decode`: every image is decoded. `header`: of a JPEG kept as it is, only the header."""

    def __post_init__(self) -> None:
        for name, choices in (("mode", get_args(Mode)), ("check", get_args(Check))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name}", "one of " + ", ".join(choices), getattr(self, name))
        sides = {"--longest-side": self.longest_side, "--shortest-side": self.shortest_side}
        given = {name: side for name, side in sides.items() if side is not None}
        for name, side in given.items():
            if side < 1:
                raise ConfigError(name, "at least 1 pixel", side)
            if self.mode in ("passthrough", "transcode"):
                raise ConfigError("--mode", f"another mode with {name}", self.mode)
        if len(given) == 2:
            got = f"--longest-side {self.longest_side} too"
            raise ConfigError("--shortest-side", "only one of the two sides", got)
        if not 1 <= self.quality <= 100:
            raise ConfigError("--quality", "1 to 100", self.quality)
        check_share("--proportion", self.proportion)
        if self.check == "header" and self.mode != "passthrough":
            raise ConfigError("--check", f"decode in mode {self.mode}", self.check)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which images of a source are taken, and what tells their classes; by default all, by folder.

    Raises:
        ConfigError: a value is out of range.
    """

    labels: Path | None = None
    """A list of images with labels, or of labels in the order of the images' names; or ImageNet's
    development kit."""
    classes: Path | None = None
    """The class names, in label order, whether or not all have images; or a .beton file that has
    them."""
    other_classes: OtherClasses = "error"
    """What becomes of images whose class is not in `classes`."""
    class_level: ClassLevel | None = None
    """`top`: an image is of the class of its first folder; `leaf`: of its whole path. None: `top`,
    with a note if that is not the same."""
    image_key: str | None = None
    """What tells images: the ending in a shard, such as jpg; a column of Parquet or of `labels`."""
    label_key: str | None = None
    """What tells labels: likewise, or a field of a shard's JSON."""
    subset: Path | None = None
    """A list of the images to take."""
    every: int = 1
    """Take every n-th image of each class, by name."""
    limit: int | None = None
    """Images to take in all: first the first of each class, then the second of each."""

    def __post_init__(self) -> None:
        for option, value in (("--every", self.every), ("--limit", self.limit)):
            if value is not None and value < 1:
                raise ConfigError(option, "at least 1", value)
        if self.other_classes == "skip" and self.classes is None:
            raise ConfigError("--other-classes", "--classes with it", "no --classes")

    def chosen(self) -> dict[str, Any]:
        """The options with another value than by default, for the manifest."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, (value, default) in values.items()
            if value != default
        }


def check_share(name: str, share: float) -> None:
    """Raise ConfigError if an option is no share."""
    if not 0 <= share <= 1:
        raise ConfigError(name, "a share between 0 and 1", share)


def check_shards(shards: int) -> None:
    """Raise ConfigError if a data set cannot have that many shards."""
    if not 1 <= shards <= _MAX_SHARDS:
        raise ConfigError("--shards", f"1 to {_MAX_SHARDS}", shards)
