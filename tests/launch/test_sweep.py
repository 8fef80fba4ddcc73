"""A sweep of W&B: what its agent passes is a configuration, and options stay options."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from irpe_ds.config import load_config
from launch import train


def test_the_agents_command_is_a_run() -> None:
    """The agent puts `--key=value` in the place of ${args}, values as Python prints them."""
    sweep: Any = yaml.safe_load(Path("launch/configs/sweep.yaml").read_text())
    chosen = {
        key: spec.get("min") or spec["values"][-1] for key, spec in sweep["parameters"].items()
    }
    words = [f"--{key}={value}" for key, value in chosen.items()]
    _, program, *rest = [text for text in sweep["command"] if text != "${args}"]
    assert program == "${program}"
    options, overrides = [], []
    for text in train.without_dashes([*rest, *words]):
        (options if text.startswith("--") else overrides).append(text)
    assert options == ["--config=launch/configs/quickstart.yaml", "--resume=auto"]
    config = load_config("launch/configs/quickstart.yaml", overrides)
    assert (config.optim.lr, config.optim.weight_decay) == (3e-4, 0.2)
    assert config.model.rpe is not None
    assert config.model.rpe.on == "qkv"
    assert (config.name, config.log.wandb.mode) == ("sweep", "online")
    kind, _, metric = sweep["metric"]["name"].partition("/")
    assert (kind, metric) == ("eval", "top1")


def test_overrides_with_dashes() -> None:
    texts = ["--train.epochs=3", "--seed=1", "--name=x", "--optim.betas=[0.9, 0.99]", "a.b=--c"]
    assert train.without_dashes(texts) == [
        *(text.removeprefix("--") for text in texts[:4]),
        "a.b=--c",
    ]
    others = [
        "--config=x.yaml",
        "--resume=runs/a.b",
        "--local_rank=0",
        "--confg=x",
        "--train.epochs",
    ]
    assert train.without_dashes(others) == others


@pytest.mark.parametrize("option", ["--confg=x.yaml", "--train.epochs", "--seeed=1", "-seed=1"])
def test_an_unknown_option_is_an_error(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "x.yaml", option])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err
