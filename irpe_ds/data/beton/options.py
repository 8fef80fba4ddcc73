"""The options of a conversion, checked before anything heavy is imported."""

from dataclasses import dataclass
from typing import Literal, get_args

from irpe_ds.errors import ConfigError

Mode = Literal["passthrough", "reencode", "raw", "proportion"]
Check = Literal["decode", "header"]
OnBad = Literal["error", "skip"]

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
            if self.mode == "passthrough":
                raise ConfigError("--mode", f"another mode with {name}", self.mode)
        if len(given) == 2:
            got = f"--longest-side {self.longest_side} too"
            raise ConfigError("--shortest-side", "only one of the two sides", got)
        if not 1 <= self.quality <= 100:
            raise ConfigError("--quality", "1 to 100", self.quality)
        check_share("--proportion", self.proportion)
        if self.check == "header" and self.mode != "passthrough":
            raise ConfigError("--check", f"decode in mode {self.mode}", self.check)


def check_share(name: str, share: float) -> None:
    """Raise ConfigError if an option is no share."""
    if not 0 <= share <= 1:
        raise ConfigError(name, "a share between 0 and 1", share)


def check_shards(shards: int) -> None:
    """Raise ConfigError if a data set cannot have that many shards."""
    if not 1 <= shards <= _MAX_SHARDS:
        raise ConfigError("--shards", f"1 to {_MAX_SHARDS}", shards)
