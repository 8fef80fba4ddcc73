"""JSON that parses is not yet true: types, keys and numbers are those that the schema declares."""

import dataclasses
import json
import math
from typing import Annotated

import pydantic
import pytest
from pydantic import Field

from irpe_ds.config_types import Count, Natural
from irpe_ds.errors import DataError
from irpe_ds.schema import Plain, Spelled, parse_json, spell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    size: Count
    names: tuple[str, ...]
    skipped: Natural = 0
    scores: dict[str, Annotated[float, Field(strict=True)]] = dataclasses.field(
        default_factory=dict
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"size": "1", "names": []}', "f: size: expected a valid integer, got '1'"),
        ('{"size": 1.0, "names": []}', "f: size: expected a valid integer, got 1.0"),
        ('{"size": true, "names": []}', "f: size: expected a valid integer, got True"),
        (
            '{"size": 1, "names": [], "skipped": -1}',
            "f: skipped: expected greater than or equal to 0, got -1",
        ),
        ('{"size": 1, "names": [2]}', "f: names.0: expected a valid string, got 2"),
        ('{"size": 1}', "f: names: expected a value, got nothing"),
        ('{"size": 1, "names": [], "sice": 2}', "f: sice: expected no such key, got 2"),
        ('{"size": 1, "names": [], "size": 2}', "f: expected valid JSON, got key 'size' twice"),
        (
            '{"size": 1, "names": [], "scores": {"a": 1e999}}',
            "f: expected valid JSON, got the number 1e999",
        ),
        ('{"size": NaN, "names": []}', "f: expected valid JSON, got the number NaN"),
        ("[]", "f: expected an object, got []"),
        ("[" * 100_000, "f: expected valid JSON, got too many nested brackets"),
    ],
)
def test_what_is_not_as_declared_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_json(text, Record, "f", DataError)
    assert str(error.value) == message


@pytest.mark.parametrize("text", [b"\xff", "9" * 5000, "", "{"])
def test_what_is_no_json_is_an_error_of_the_users(text: str | bytes) -> None:
    with pytest.raises(DataError, match="f: expected valid JSON, got"):
        parse_json(text, Record, "f", DataError)


def test_a_long_value_is_cut_short_in_the_message() -> None:
    with pytest.raises(DataError) as error:
        parse_json('{"size": "' + 1000 * "x" + '", "names": []}', Record, "f", DataError)
    assert len(str(error.value)) < 150


def test_names_that_are_not_utf8_and_whole_numbers_as_scores_are_kept() -> None:
    text = '{"size": 1, "names": ["\\udcff"], "scores": {"a": 1}}'
    assert parse_json(text, Record, "f", DataError) == Record(
        size=1, names=("\udcff",), scores={"a": 1.0}
    )


@pytest.mark.parametrize("value", [1.5, -2, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_spelled(value: float) -> None:
    text = json.dumps({"a": spell(value)}, allow_nan=False)
    assert parse_json(text, dict[str, Spelled], "f", DataError) == {"a": value}


@pytest.mark.parametrize("text", ['{"a": "1.5"}', '{"a": "Inf"}', '{"a": ["nan"]}', '{"a": true}'])
def test_other_text_is_no_number(text: str) -> None:
    with pytest.raises(DataError, match="f: a: expected a valid number"):
        parse_json(text, dict[str, Spelled], "f", DataError)


@pytest.mark.parametrize(("levels", "fits"), [(16, True), (17, False), (900, False)])
def test_values_of_any_type_are_not_deep(levels: int, fits: bool) -> None:
    """Functions that call themselves follow them: comparisons, and messages with them."""
    text = '{"a": ' + levels * "[" + levels * "]" + "}"
    if fits:
        assert (
            str(parse_json(text, dict[str, Plain], "f", DataError)["a"])
            == levels * "[" + levels * "]"
        )
        return
    with pytest.raises(DataError, match=r"^f: a: expected at most 16 levels, got \[\[\["):
        parse_json(text, dict[str, Plain], "f", DataError)
