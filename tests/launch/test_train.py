"""Training through the `deepspeed` command with two processes: stages, precisions, resuming."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irpe_ds.config import load_config
from irpe_ds.models.build import build_model

pytestmark = pytest.mark.dist
UPDATES = 20


@pytest.fixture(scope="module")
def deepspeed(run: Any, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train with two processes into a run folder of this name; the folder."""
    output = tmp_path_factory.mktemp("runs")

    def deepspeed(name: str, *overrides: str, resume: str = "never") -> Path:
        done: subprocess.CompletedProcess[str] = run(
            *("deepspeed", "--num_accelerators", 2, "--master_port", free_port()),
            "launch/train.py",
            *("--config", "launch/configs/quickstart.yaml", "--resume", resume),
            *(f"name={name}", f"output={output}"),
            *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton"),
            *("model.options.depth=2", "model.drop_path=0.1", "train.log_every=1"),
            *("train.epochs=2", "train.global_batch=96", "train.accumulation=1"),
            f"train.max_updates={UPDATES}",
            *overrides,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return output / name

    return deepspeed


@pytest.fixture(scope="module")
def parity(deepspeed: Any) -> dict[tuple[int, str], Path]:
    """The same run under every ZeRO stage in fp32 and bf16."""
    return {
        (stage, precision): deepspeed(
            f"zero{stage}-{precision}",
            f"train.deepspeed=ds_configs/zero{stage}.json",
            f"train.precision={precision}",
        )
        for stage in range(4)
        for precision in ("fp32", "bf16")
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(folder: Path) -> torch.Tensor:
    found = [row["loss"] for row in rows(folder, "train")]
    assert len(found) == UPDATES
    return torch.tensor(found)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/update-{UPDATES:08d}/weights.safetensors")


def test_fp32_losses_agree_across_stages(parity: dict[tuple[int, str], Path]) -> None:
    reference = losses(parity[0, "fp32"])
    assert reference[-1] < reference[0] - 0.2
    for stage in (1, 2, 3):
        torch.testing.assert_close(losses(parity[stage, "fp32"]), reference, rtol=0, atol=1e-5)


def test_bf16_follows_fp32(parity: dict[tuple[int, str], Path]) -> None:
    reference = losses(parity[0, "fp32"])
    for stage in range(4):
        found = losses(parity[stage, "bf16"])
        torch.testing.assert_close(found[:10], reference[:10], rtol=0, atol=0.02)


def test_weights_are_whole_and_in_fp32(parity: dict[tuple[int, str], Path]) -> None:
    for (stage, precision), folder in parity.items():
        found = weights(folder)
        model = build_model(load_config(folder / "config.yaml").model)
        shapes = {key: (value.shape, torch.float32) for key, value in model.state_dict().items()}
        assert {key: (v.shape, v.dtype) for key, v in found.items()} == shapes, (stage, precision)
        if precision == "bf16":  # from the master weights, not from their rounded copies
            head = found["head.weight"]
            assert not torch.equal(head, head.bfloat16().float())


def test_run_folder_keeps_what_is_needed_to_repeat_it(parity: dict[tuple[int, str], Path]) -> None:
    folder = parity[1, "bf16"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["attention_op"]["name"]
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads((folder / "deepspeed.json").read_text())["bf16"] == {"enabled": True}
    assert load_config(folder / "config.yaml").train.max_updates == UPDATES
    (evaluation,) = [row for row in rows(folder, "eval") if row["update"] == UPDATES]
    assert evaluation["images"] == 360


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_resuming_is_bitwise_the_uninterrupted_run(
    stage: int, precision: str, parity: dict[tuple[int, str], Path], deepspeed: Any
) -> None:
    name = f"resumed-{stage}-{precision}"
    settings = (f"train.deepspeed=ds_configs/zero{stage}.json", f"train.precision={precision}")
    deepspeed(name, *settings, "train.max_updates=8")  # in the middle of the first epoch
    folder = deepspeed(name, *settings, resume="auto")
    whole = parity[stage, precision]
    assert torch.equal(losses(folder), losses(whole))
    assert rows(folder, "eval")[-1] == rows(whole, "eval")[-1]
    expected, got = weights(whole), weights(folder)
    assert all(torch.equal(expected[key], got[key]) for key in expected | got)


def test_evaluate_scores_the_checkpoint_on_disk(
    parity: dict[tuple[int, str], Path], run: Any
) -> None:
    folder = parity[0, "fp32"]
    done = run(sys.executable, "launch/evaluate.py", "--run", folder)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in rows(folder, "eval") if row["update"] == UPDATES]
    assert f"top-1 {row['top1']:.2f} %" in done.stdout
    assert "on 360 images" in done.stdout
