"""launch/summary.py: a run in a few lines, or what the folder lacks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from irpe_ds.errors import UserError
from launch import summary
from tests.logs import open_log

TextOf = Callable[[Path], str]


def make_run(folder: Path) -> Path:
    with open_log(folder) as log:
        log.log("train", 11, {"loss": 1.0, "images_per_s": 500.0})
        log.log("eval", 22, {"top1": 96.5, "epoch": 1.0})
    facts = {"ranks": 2, "device": "CPU", "attention_op": {"name": "cpu", "why": "auto"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def text_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> TextOf:
    def text_of(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["summary.py", str(folder)])
        summary.main()
        return capsys.readouterr().out

    return text_of


def test_a_run(tmp_path: Path, text_of: TextOf) -> None:
    text = text_of(make_run(tmp_path / "a run"))
    assert "a run: top-1 96.50 % after 1 epochs, 500 img/s on 2 x CPU" in text
    assert f"launch/curves.py '{tmp_path}/a run' --out curves.png" in text


IN_THE_REPOSITORY = (
    "python launch/curves.py",
    "python launch/evaluate.py --run",
    "deepspeed launch/train.py --config",
)
ELSEWHERE = (
    "irpe-ds curves",
    "irpe-ds evaluate --run",
    "deepspeed --module irpe_ds train --config",
)


@pytest.mark.parametrize("is_clone", [True, False])
def test_next_commands_can_be_typed_here(
    is_clone: bool, tmp_path: Path, text_of: TextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    monkeypatch.chdir(Path(__file__).parents[2] if is_clone else tmp_path)
    text = text_of(tmp_path / "run")
    curves, evaluate, train = IN_THE_REPOSITORY if is_clone else ELSEWHERE
    assert text.count(f"  {curves} {tmp_path}/run ") == 2
    assert f"  {evaluate} {tmp_path}/run\n" in text
    assert f"  {train} {tmp_path}/run/config.yaml " in text
    assert ("source .venv" in text) == is_clone


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, text_of: TextOf) -> None:
    text = text_of(make_run(tmp_path / "\x1b]0;mine\x07"))
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "", "has not finished an epoch"),
        (
            "metrics.jsonl",
            '{"kind": "train", "update": 1}\n{"kind": "eval", "update": 1}\n',
            "top1",
        ),
        ("metrics.jsonl", "[]\n", r"metrics\.jsonl:1: expected a row"),
        ("environment.json", "[]", r"environment\.json: expected an object"),
        ("environment.json", None, r"environment\.json: .*No such file"),
        ("metrics.jsonl", None, r"metrics\.jsonl: expected a readable"),
    ],
)
def test_what_is_wrong_is_said(
    file: str, content: str | None, message: str, tmp_path: Path, text_of: TextOf
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        text_of(folder)
