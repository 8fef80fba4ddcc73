"""model.freeze: which parameters are trained."""

import pytest
import timm
import torch
from torch import nn

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_deferred
from irpe_ds.models.create import recompute_blocks
from irpe_ds.models.freezing import freeze

DEIT = "deit_tiny_patch16_224"
TABLES = [f"blocks.{n}.attn.rpe_k.lookup_table_weight" for n in range(2)]


def trained(what: int | list[str], name: str = DEIT) -> list[str]:
    """Names of what is trained of a small DeiT with tables on keys, or of another model."""
    small = {"options": {"depth": 2, "embed_dim": 48, "num_heads": 3}, "rpe": {}}
    config = {"name": name, "freeze": what} | (small if name == DEIT else {})
    model, _ = build_deferred(ModelConfig.model_validate(config), seed=0)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_first_blocks_and_what_is_before_them() -> None:
    everything = trained(0)
    assert {"pos_embed", "patch_embed.proj.weight", TABLES[0]} < {*everything}
    assert trained(1) == [
        name for name in everything if name.startswith(("blocks.1.", "norm", "h"))
    ]
    assert trained(2) == ["head.weight", "head.bias"]  # of the last block timm counts the norm too
    assert trained(1, "resnet10t")[0].startswith("layer2")


def test_names_and_patterns() -> None:
    everything = trained(0)
    kept = [
        name for name in everything if name[:3] not in ("pos", "pat") and "blocks.0" not in name
    ]
    assert trained(["pos_embed", "patch_embed", "blocks.[0]"]) == kept
    assert trained(["*", "!*.rpe_?", "!head"]) == [*TABLES, "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["blocks.7"], r"names of parameters or modules, such as cls_token, got 'blocks\.7'"),
        (["head", "!heed"], "names of .*, such as cls_token, got '!heed'"),
        (["*"], r"some parameters left to train, got \('\*',\)"),
        (3, "some parameters left to train, got 3"),
    ],
)
def test_mistakes(what: int | list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.freeze: expected {message}"):
        trained(what)


def test_a_model_without_layers_of_timm() -> None:
    with pytest.raises(ConfigError, match=r"expected names: timm does not group .* Linear, got 1"):
        freeze(nn.Linear(2, 2), 1)


@pytest.mark.parametrize("every", [True, 2])
def test_gradients_pass_recomputed_blocks_behind_frozen_ones(every: bool | int) -> None:
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    model = timm.create_model(DEIT, **options).train()
    freeze(model, 1)
    recompute_blocks(model, int(every))
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
