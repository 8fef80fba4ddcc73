"""Families of timm with relative position train alike under any ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch

from tests.launch.outcomes import EPS, losses, slow, tensors, zero
from tests.launch.ranks import Ranks

pytestmark = pytest.mark.dist
UPDATES = 2
FAMILIES = {
    "eva": ["model.name=eva02_tiny_patch14_224", "optim.layer_decay=0.7"],
    "dinov3": ["model.name=vit_small_patch16_dinov3", "model.grad_checkpointing=true"],
    "beit": ["model.name=beitv2_base_patch16_224", "model.drop_path=0.1"],
    "qwen3": ["model.name=qwen3_vit_88m"],
}


@pytest.fixture(scope="module", params=[("eva", "beit"), slow(("dinov3", "qwen3"))], ids="-".join)
def trained(
    request: pytest.FixtureRequest, common: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Runs under ZeRO-0 and ZeRO-3 of families, in the same processes one after the other."""
    folder, output = tmp_path_factory.mktemp("families"), Path(common[0].removeprefix("output="))
    partitioned = json.loads(Path("ds_configs/zero3.json").read_text())
    partitioned["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(partitioned))
    small = [*common, EPS, f"train.max_updates={UPDATES}", "model.rpe.on=qkv"]
    runs = [
        (
            [*small, *zero(0), *FAMILIES[name], f"train.deepspeed={path}", f"name={name}-{stage}"],
            "never",
        )
        for stage, path in ((0, "ds_configs/zero0.json"), (3, folder / "zero3.json"))
        for name in request.param  # stage 3 last: it patches torch.nn.functional.linear for good
    ]
    Ranks(folder, 2, runs).succeed()
    return [output / name for name in request.param]


@pytest.mark.parametrize("number", [0, 1])
def test_stages_agree_and_tables_learn(trained: list[Path], number: int) -> None:
    whole, partitioned = (Path(f"{trained[number]}-{stage}") for stage in (0, 3))
    torch.testing.assert_close(
        losses(partitioned, UPDATES), losses(whole, UPDATES), rtol=0, atol=1e-4
    )
    expected = tensors(whole, "weights", UPDATES)
    for key, weight in tensors(partitioned, "weights", UPDATES).items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-6, msg=key)
    tables = [weight for key, weight in expected.items() if "blocks.0" in key and "rpe_" in key]
    assert len(tables) == 3
    assert all(table.any() for table in tables)
