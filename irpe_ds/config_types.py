"""The types of values in a run's configuration, checked as they are read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from irpe_ds.errors import ConfigError

Count = Annotated[int, Field(strict=True, gt=0)]
"""integer above 0"""
Natural = Annotated[int, Field(strict=True, ge=0)]
"""integer from 0"""
Positive = Annotated[float, Field(strict=True, gt=0)]
"""number above 0"""
NonNegative = Annotated[float, Field(strict=True, ge=0)]
"""number from 0"""
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]
"""number in [0, 1]"""
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
"""number in (0, 1]"""
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""number in [0, 1)"""
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1)]
"""number in (0, 1)"""


def _class_count(value: object) -> object:
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise ConfigError("", "an integer above 0, or auto", repr(value))


ClassCount = Annotated[int | Literal["auto"], BeforeValidator(_class_count)]
"""integer above 0, or `auto`"""


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ConfigError("", "the smaller number first", list(pair))
    return pair


def _height_width(size: object) -> object:
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size, size]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ConfigError("", "a positive integer or [height, width]", repr(size))
    return tuple(sides)


def _written_size(size: tuple[int, int]) -> int | tuple[int, int]:
    height, width = size
    return height if height == width else size


def from_the_first_epoch(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    epochs = [epoch for epoch, _ in rows]
    if epochs and (epochs[0] != 0 or epochs != sorted(set(epochs))):
        expected = "[epoch, pixels] pairs with ascending epochs, the first 0"
        raise ConfigError("", expected, [list(row) for row in rows])
    return rows


def _every_nth(value: object) -> object:
    if type(value) is bool:
        return int(value)
    if type(value) is not int or value < 0:
        raise ConfigError("", "true, false or a number of blocks", repr(value))
    return value


def _written_nth(number: int) -> int | bool:
    return bool(number) if number < 2 else number


EveryNth = Annotated[int, BeforeValidator(_every_nth), PlainSerializer(_written_nth)]
"""true, false or a number n"""

Size = Annotated[tuple[int, int], BeforeValidator(_height_width), PlainSerializer(_written_size)]
"""pixels, or [height, width]"""


HUB = "hf-hub:"


def _source(value: object) -> object:
    """A URL or the name of a repository stays a string; what else is one is a path."""
    if isinstance(value, str):
        return value if value.startswith((HUB, "https://", "http://")) else Path(value)
    if not isinstance(value, Path):
        raise ConfigError("", f"a path, a URL or {HUB}OWNER/NAME", repr(value))
    return value


Source = Annotated[Path | str, BeforeValidator(_source)]
"""path, URL or hf-hub:OWNER/NAME"""


@dataclass(frozen=True)
class Interval:
    """How often something is done."""

    count: int
    unit: Literal["update", "epoch", "minute"]


def every(text: object) -> object:
    """An Interval from `500`, which are updates, `2 epochs` or `30 minutes`."""
    if isinstance(text, Interval):
        return text
    pattern = r"([1-9]\d*)(?: (update|epoch|minute)s?)?"
    match = None if isinstance(text, bool) else re.fullmatch(pattern, str(text))
    if match is None:
        raise ConfigError(
            "", "a number of updates, or such as `2 epochs`, `30 minutes`", repr(text)
        )
    return Interval(int(match[1]), match[2] or "update")  # type: ignore[arg-type]


def _written_interval(interval: Interval) -> int | str:
    if interval.unit == "update":
        return interval.count
    return f"{interval.count} {interval.unit}" + ("s" if interval.count > 1 else "")


Every = Annotated[Interval, BeforeValidator(every), PlainSerializer(_written_interval)]
"""updates, `2 epochs` or `30 minutes`"""
