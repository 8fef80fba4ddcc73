"""A user's mistakes: exit code 2, one short message that names the place, no traceback."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from irpe_ds.checkpoint.reader import CheckpointManifest
from irpe_ds.cluster.process_group import destroy_process_group
from tests import checkpoint_ranks
from tests.launch.ranks import free_port

CONFIG = "launch/configs/quickstart.yaml"


@pytest.fixture(scope="module")
def mistakes(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("mistakes")
    both = {"zero_optimization": {"stage": 1}, "train_batch_size": 8}
    (folder / "both.json").write_text(json.dumps(both))
    half = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}
    (folder / "fp16.json").write_text(json.dumps(half))
    whole = (digits / "train.beton").read_bytes()
    (folder / "short.beton").write_bytes(whole[: len(whole) // 2])
    (folder / "short.beton.json").write_bytes((digits / "train.beton.json").read_bytes())
    (folder / "headless.beton").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {"head.weight": torch.zeros(10, 96)}}, folder / "other.pth")
    saved: dict[str, Any] = {"update": 7, "world_size": 1, "zero_stage": 1, "seed": 0, "op": {}}
    saved |= {
        "num_samples": 1438,
        "global_batch": 64,
        "updates_per_epoch": 22,
        "config": {},
        "shapes": {},
    }
    checkpoint_ranks.save(folder, CheckpointManifest(**saved), {})
    return {path.name: path for path in folder.iterdir()}


CASES = {
    "unknown key": ("train.epoch=3", "train.epoch", "epochs"),
    "wrong type": ("train.epochs=many", "train.epochs", "'many'"),
    "json sets batch size": ("train.deepspeed={both.json}", "both.json", "train.global_batch"),
    "fp16 and bf16": ("train.deepspeed={fp16.json}", "fp16.json", "train.precision"),
    "missing beton": ("data.train=nowhere.beton", "data.train", "nowhere.beton"),
    "truncated beton": ("data.train={short.beton}", "data.train", "bytes"),
    "truncated beton, no manifest": ("data.train={headless.beton}", "data.train", "headless.beton"),
    "unknown model": ("model.name=vit_tinny_patch16_224", "model.name", "vit_tiny_patch16_224"),
    "rpe on nothing known": ("model.rpe.on=qx", "model.rpe.on", "'qx'"),
    "classes": ("model.num_classes=11", "model.num_classes", "10"),
    "weights of another model": ("model.weights={other.pth}", "model.weights", "other.pth"),
    "checkpoint of another model": (
        "--resume={update-00000007}",
        "update-00000007",
        "of shape",
    ),
    "unknown implementation": ("model.impl=fussed", "impl", "'fussed'"),
    "indivisible batch": ("train.global_batch=63", "train.global_batch", "63"),
    "no such yaml": ("--config=nowhere.yaml", "nowhere.yaml", "No such file"),
    "no such checkpoint": ("--resume=nowhere", "--resume", "nowhere"),
}


def check(stderr: str, *parts: str) -> None:
    (start,) = [n for n, line in enumerate(stderr.splitlines()) if "error: " in line]
    message = stderr.splitlines()[start:]
    assert len(message) <= 3, stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in "\n".join(message)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run launch/train.py in this process, which has paid for the imports; code and stderr."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for key, value in (ranks | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(key, value)

    def train(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path("launch/train.py", run_name="__main__")
        destroy_process_group()
        return stopped.value.code, capfd.readouterr().err

    return train


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_message(
    name: str, train: Any, digits: Path, mistakes: dict[str, Path], tmp_path: Path
) -> None:
    argument, *parts = CASES[name]
    for key, path in mistakes.items():
        argument = argument.replace(f"{{{key}}}", str(path))
    config = () if argument.startswith("--config") else ("--config", CONFIG)
    data = (f"data.train={digits}/train.beton", f"data.val={digits}/val.beton")
    accumulation = ("train.accumulation=2",) if name == "indivisible batch" else ()
    code, stderr = train(*config, *data, *accumulation, f"output={tmp_path}", argument)
    assert code == 2
    check(stderr, *parts)
    assert not list(tmp_path.iterdir())


def test_every_rank_says_it_once(run: Any, digits: Path, tmp_path: Path) -> None:
    done = run(
        *("deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "launch/train.py"),
        *("--config", CONFIG),
        *(f"data.train={digits}/train.beton", "data.val=nowhere.beton", f"output={tmp_path}"),
    )
    assert done.returncode == 2, done.stderr
    messages = [line for line in done.stderr.splitlines() if "error: data.val" in line]
    assert 1 <= len(messages) <= 2  # the launcher may end a rank before it has spoken
    assert len(set(messages)) == len(messages)
    assert all(line.startswith("[rank ") for line in messages)
    assert "Traceback" not in done.stdout + done.stderr


def test_an_existing_run_is_not_written_over(train: Any, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/metrics.jsonl").write_text("")
    data = (f"data.train={digits}/train.beton", f"data.val={digits}/val.beton")
    code, stderr = train("--config", CONFIG, *data, f"output={tmp_path}")
    assert code == 2
    check(stderr, "quickstart", "--resume auto")
