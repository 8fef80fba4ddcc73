"""Files that are no configuration, or YAML that is to be wary of: one message, at once."""

import os
from pathlib import Path

import pytest

from irpe_ds.config import load_config
from irpe_ds.errors import ConfigError
from tests.test_config import MINIMAL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


LAUGHS = "\n".join(["n0: &n0 [x, x]", *(f"n{i + 1}: &n{i + 1} [*n{i}, *n{i}]" for i in range(30))])
MERGED = LAUGHS.replace("[x, x]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}")
HOSTILE = {
    "? [a]: 1": "a key that is not a string",
    "? {a: 1}\n: 1": "a key that is not a string",
    "1: a": "a key that is not a string",
    "a: " + "9" * 5000: "not an integer of at most 18 digits",
    "a: " + "[" * 100_000: "more than 50 levels",
    "- " * 4000: "more than 50 levels",
    LAUGHS: "more than 20000 values",
    MERGED: "more than 20000 values",
    "a: &a [*a]": "an alias inside of what it stands for",
    "a: *b": "undefined alias",
    "a: !!binary aGVsbG8=": "could not determine a constructor",
    "a: !!timestamp 2020-13-45": "could not determine a constructor",
    "a: !!int x": "'x' is not an integer",
    "a: !!bool maybe": "'maybe' is not true or false",
    "a: !!null x": "'x' is not null",
    "a: !!str [1]": "expected a scalar node",
    'a: "\\UFFFFFFFF"': "too large",
    'a: "\\0"': "is not text without NUL",
    'a: "\\ud800"': "is not text without NUL and surrogates",
}


@pytest.mark.parametrize(
    ("content", "expected", "got"),
    [
        ("", "a mapping of sections", "NoneType"),
        ("- a", "a mapping of sections", "list"),
        ("a: [", "valid YAML", "line 1, column 5"),
        ("a: !!python/object:os.system {}", "valid YAML", "python/object"),
        *((content, "valid YAML", got) for content, got in HOSTILE.items()),
    ],
)
def test_of_a_file(content: str, expected: str, got: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.where == file
    assert caught.value.expected == expected
    assert got in str(caught.value.got)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["? [a]: 1", "9" * 5000, "[" * 4000, "!!int x", "*a"])
def test_of_a_value_that_is_hard_to_read(text: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.epochs: expected a YAML value") as caught:
        load_config(file, [f"train.epochs={text}"])
    assert len(str(caught.value)) < 250


def test_a_date_is_text_as_in_yaml_1_2(file: Path) -> None:
    assert load_config(file, ["name=2020-13-45"]).name == "2020-13-45"
    with pytest.raises(ConfigError, match=r"^train\.epochs: expected .* '2020-11-30'$"):
        load_config(file, ["train.epochs=2020-11-30"])


def test_an_alias_is_what_it_stands_for(file: Path) -> None:
    file.write_text(f"{MINIMAL}augment: {{scale: &a [0.1, 1.0], ratio: *a}}\n")
    assert load_config(file).augment.ratio == (0.1, 1.0)


@pytest.mark.parametrize("size", [1 << 20, None])
def test_of_a_file_that_is_no_configuration(size: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    got = "not a regular file"
    if size is None:
        os.mkfifo(path)
    else:
        path.write_bytes(b"#" * (size + 1))
        got = f"more than {size} bytes"
    with pytest.raises(ConfigError, match=f"expected a readable YAML file, got {got}"):
        load_config(path)


def test_of_a_binary_file(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected "):
        load_config(file)


def test_of_a_key_that_comes_twice(file: Path) -> None:
    file.write_text(MINIMAL + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="seed"):
        load_config(file)


@pytest.mark.parametrize(("name", "got"), [("no.yaml", "No such file"), ("", "Is a directory")])
def test_of_a_path(name: str, got: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"expected a readable YAML file, got {got}"):
        load_config(tmp_path / name)
