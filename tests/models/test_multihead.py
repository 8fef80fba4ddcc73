"""RPEMultiheadAttention: what torch.nn.MultiheadAttention computes, and relative position."""

import pytest
import torch
from torch import nn

from irpe_ds import RPEConfig, RPEMultiheadAttention
from irpe_ds.errors import ConfigError

X = torch.linspace(-1, 1, 2 * 7 * 24).sin().view(2, 7, 24)
IGNORED = torch.tensor([[False] * 7, [False, True, False, False, True, False, False]])


def module(**options: object) -> RPEMultiheadAttention:
    options = {"rpe": RPEConfig(on="qkv"), "grid": (2, 3), "num_prefix_tokens": 1, **options}
    return RPEMultiheadAttention(24, 3, **options)


@pytest.mark.parametrize("mask", [None, IGNORED], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_pytorch_s_until_the_tables_move(bias: bool, mask: torch.Tensor | None) -> None:
    theirs, ours = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True), module(bias=bias)
    ours.qkv.weight.data, ours.proj.weight.data = theirs.in_proj_weight, theirs.out_proj.weight
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        ours.qkv.bias.data, ours.proj.bias.data = theirs.in_proj_bias, theirs.out_proj.bias
    expected, _ = theirs(X, X, X, key_padding_mask=mask)
    torch.testing.assert_close(ours(X, key_padding_mask=mask), expected)

    ours(X).square().sum().backward()
    assert all(p.grad.any() for key, p in ours.named_parameters() if "lookup_table" in key)


def test_dropout_in_training_only() -> None:
    ours = module(dropout=0.5)
    assert not torch.equal(ours(X), ours(X))
    assert torch.equal(ours.eval()(X), ours(X))


def test_on_a_device_in_a_dtype() -> None:
    assert {t.device.type for t in module(device="meta").state_dict().values()} == {"meta"}
    assert module(dtype=torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16


def test_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"^embed_dim: expected a multiple of num_heads 5, got"):
        RPEMultiheadAttention(24, 5, rpe=RPEConfig(), grid=(2, 3))
    with pytest.raises(ConfigError, match=r"^grid: expected height and width >= 1"):
        module(grid=(0, 3))
    with pytest.raises(ConfigError, match=r"^impl: expected auto or one of"):
        module(impl="fast")
    with pytest.raises(ConfigError, match=r"^key_padding_mask: expected torch.bool \(2, 7\)"):
        module()(X, key_padding_mask=IGNORED.float())
    with pytest.raises(ConfigError, match=r"expected 7 tokens \(2x3 patches \+ 1 prefix\), got 6"):
        module()(X[:, 1:])
