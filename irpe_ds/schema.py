"""JSON that is read back: parsed strictly, and of the types that its reader declares."""

import json
import math
import reprlib
from typing import Annotated, Any, NoReturn, TypeVar

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from irpe_ds.errors import UserError

Checked = TypeVar("Checked")
_SHOWN = 60  # characters of a wrong value in a message
_LEVELS = 16  # that a value may be nested
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 4, 60, 60, 2 * _SHOWN

Number = Annotated[float, Field(strict=True)]
"""number"""


def _not_deep(value: Any) -> Any:
    if _is_deep(value, _LEVELS):
        raise PydanticCustomError("depth", "at most 16 levels")
    return value


def _is_deep(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deep(item, levels - 1) for item in inner)


Plain = Annotated[Any, AfterValidator(_not_deep)]
"""any value of JSON that functions which call themselves can follow"""


def spell(number: float) -> float | str:
    """A number for JSON, which has no NaN or infinity: "nan", "inf" or "-inf" stand for them."""
    return number if math.isfinite(number) else str(number)


def _spelled(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


Spelled = Annotated[float, Field(strict=True), BeforeValidator(_spelled)]
"""a number, or one that is not finite as `spell` gives it"""


def parse_json(
    text: bytes | str, schema: type[Checked], where: object, error: type[UserError]
) -> Checked:
    """The value of a JSON text, as `schema`: a dataclass, a TypedDict or any type of pydantic.

    Its numbers should be types of `config_types` such as Count: a plain int takes "1" too. All
    numbers are finite, and no object has a key twice. Strings may hold lone surrogates, as names of
    files do that are not UTF-8; pydantic's own parser refuses them.

    Raises:
        UserError: of this class; names `where`, the key in it, what was expected and found.
    """
    try:
        values = json.loads(
            text, object_pairs_hook=_each_once, parse_constant=_refuse, parse_float=_finite
        )
        checked: Checked = pydantic.TypeAdapter(schema).validate_python(values)
        return checked
    except pydantic.ValidationError as invalid:
        finding = invalid.errors(include_url=False)[0]
        keys = ".".join(map(str, finding["loc"]))
        expected, got = finding["msg"].removeprefix("Input should be "), _short(finding["input"])
        if finding["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
            expected, got = "a value", "nothing"
        elif finding["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            expected = "no such key"
        elif finding["type"] == "dataclass_type":
            expected = "an object"
        place = f"{where}: {keys}" if keys else where
        raise error(place, expected[:1].lower() + expected[1:], got) from None
    except RecursionError:
        raise error(where, "valid JSON", "too many nested brackets") from None
    except ValueError as invalid:  # of json, of Unicode, and of integers with thousands of digits
        raise error(where, "valid JSON", invalid) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} twice")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _refuse(text)
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def _short(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
