"""environment.json is read back: what scripts use of it has the type that was written."""

from pathlib import Path

import pytest

from irpe_ds.environment import Environment, read_environment
from irpe_ds.errors import CheckpointError


def test_what_is_not_there_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"ranks": 2, "hosts": {"a": 2}, "cuda": null}')
    assert read_environment(tmp_path) == Environment(ranks=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"ranks": "2"}',
        '{"ranks": 0}',
        '{"device": 5}',
        '{"packages": [1]}',
        "[" * 5000,
    ],
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"environment\.json: "):
        read_environment(tmp_path)


def test_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"environment\.json: .* No such file"):
        read_environment(tmp_path)
