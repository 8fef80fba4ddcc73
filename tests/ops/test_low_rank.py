"""The low_rank implementation of the method cross, in one call of PyTorch's fused attention."""

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from irpe_ds.errors import ConfigError
from irpe_ds.ops import DispatchKey, irpe_attention, resolve_impl
from irpe_ds.ops.inputs import TermSpec
from irpe_ds.rpe.config import RPEConfig
from tests.ops.comparison import (
    ENCODINGS,
    assert_as_exact_as_the_reference,
    assert_equals_the_reference,
    ids,
    leaves_of,
    results,
)

CROSS = [rpe for rpe in ENCODINGS if rpe.method == "cross"]


class TestAgainstTheReference:
    @pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 6), (6, 1), (1, 1)])
    @pytest.mark.parametrize("rpe", CROSS, ids=ids)
    def test_every_encoding(
        self, make_inputs: Callable, rpe: RPEConfig, grid: tuple[int, int]
    ) -> None:
        assert_equals_the_reference(make_inputs(rpe, grid=grid), "low_rank")

    @pytest.mark.parametrize("skip", [0, 1, 2])
    @pytest.mark.parametrize("mode", ["contextual", "bias"])
    @pytest.mark.parametrize("on", ["q", "k", "qk"])
    def test_every_side(self, make_inputs: Callable, on: str, mode: str, skip: int) -> None:
        rpe = RPEConfig(method="cross", mode=mode, on=on)
        inputs = make_inputs(rpe, grid=(9, 4), skip=skip, batch=3)
        assert_equals_the_reference(inputs, "low_rank", scale=0.3)

    def test_without_terms(self, make_inputs: Callable) -> None:
        assert_equals_the_reference(make_inputs(), "low_rank")

    def test_a_scale_of_zero_leaves_the_bias(self, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(method="cross", mode="bias", on="qk"))
        assert_equals_the_reference(inputs, "low_rank", scale=0.0)

    def test_terms_of_different_kinds_add_up(self, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(method="cross", on="qk"))
        bias = make_inputs(RPEConfig(method="cross", mode="bias", on="qk", shared_heads=False))
        inputs["rpe_q"] += bias["rpe_q"][:1]
        inputs["rpe_k"] += bias["rpe_k"][1:]
        assert_equals_the_reference(inputs, "low_rank")

    def test_key_padding(self, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(method="cross", on="qk"), batch=3)
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 2:5], mask[1] = True, True
        assert_equals_the_reference(inputs, "low_rank", key_padding_mask=mask)
        with_no_key = results(inputs, impl="low_rank", key_padding_mask=mask)
        assert not any(with_no_key[name][1].any() for name in ("out", *"qkv"))

    def test_an_empty_batch(self, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(method="cross", on="qk"), batch=0)
        assert_equals_the_reference(inputs, "low_rank")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mode", ["contextual", "bias"])
    def test_low_precision(self, make_inputs: Callable, mode: str, dtype: torch.dtype) -> None:
        rpe = RPEConfig(method="cross", mode=mode, on="qk")
        inputs = make_inputs(rpe, grid=(14, 14), head_dim=32, dtype=dtype)
        assert_as_exact_as_the_reference(inputs, "low_rank")


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_fit_for_flash_attention(make_inputs: Callable, masked: bool) -> None:
    inputs = make_inputs(RPEConfig(method="cross", on="qk"), head_dim=10)
    mask = torch.zeros(2, 7, dtype=torch.bool) if masked else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_equals_the_reference(inputs, "low_rank", key_padding_mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "masked"),
    [(SDPBackend.FLASH_ATTENTION, False), (SDPBackend.EFFICIENT_ATTENTION, True)],
)
@pytest.mark.parametrize("on", ["k", "qk"])
def test_on_a_gpu(make_inputs: Callable, on: str, backend: SDPBackend, masked: bool) -> None:
    rpe = RPEConfig(method="cross", on=on)
    inputs = make_inputs(rpe, grid=(14, 14), batch=3, head_dim=64, dtype=torch.bfloat16)
    mask = torch.rand(3, 197, device="cuda") < 0.3 if masked else None
    with sdpa_kernel(backend):
        assert_as_exact_as_the_reference(inputs, "low_rank", "cuda", key_padding_mask=mask)


def test_dropout_drops_weights_and_scales_the_others(make_inputs: Callable) -> None:
    """With unit vectors as values the output is the weights."""
    p = 0.25
    inputs = make_inputs(RPEConfig(method="cross", on="qk"), batch=200, skip=2, head_dim=8)
    inputs["v"] = torch.eye(8, dtype=torch.float64).expand_as(inputs["v"])

    def weights(dropout_p: float) -> Tensor:
        torch.manual_seed(7)
        return irpe_attention(**inputs, dropout_p=dropout_p, impl="low_rank")

    full, dropped = weights(0.0), weights(p)
    kept = dropped != 0
    torch.testing.assert_close(dropped, kept * full / (1 - p))
    assert torch.equal(weights(p), dropped)  # one seed, one mask
    share = kept.double().mean().item()
    assert share == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / kept.numel()))


@pytest.mark.parametrize("mode", ["contextual", "bias"])
def test_compiles_as_one_graph(make_inputs: Callable, mode: str) -> None:
    inputs = make_inputs(RPEConfig(method="cross", mode=mode, on="qk"))
    inputs["key_padding_mask"] = torch.zeros(2, 7, dtype=torch.bool)
    attention = partial(irpe_attention, impl="low_rank")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(**inputs), attention(**inputs)
    torch.testing.assert_close(out, expected)
    leaves = list(leaves_of(inputs).values())
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
    )


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            TermSpec("k", "product", (7, 7), 1, 1.9, False),
            "it supports the method cross, not product",
        ),
        (
            TermSpec("q", "euclidean", (7, 7), 1, 1.9, True),
            "it supports the method cross, not euclidean",
        ),
        (
            TermSpec("v", "cross_rows", (7, 7), 1, 1.9, False),
            "it supports RPE on queries and keys, not on values",
        ),
    ],
)
def test_what_it_does_not_take(spec: TermSpec, reason: str) -> None:
    key = DispatchKey(
        "cpu", torch.float32, 64, (TermSpec("k", "cross_rows", (7, 7), 1, 1.9, False),)
    )
    with pytest.raises(ConfigError, match=re.escape(f"got 'low_rank': {reason}") + "$"):
        resolve_impl("low_rank", key._replace(terms=(*key.terms, spec)))
    assert resolve_impl("low_rank", key).name == "low_rank"
