"""The flex implementation: on the CPU unfused, in float64; its kernels where there is a GPU."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import DispatchKey, dispatch, irpe_attention, resolve_impl
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

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """impl="flex" runs on the CPU too, for every dtype and head dimension.

    The unfused FlexAttention has a backward there, which PyTorch's check keeps from users.
    """
    row = dispatch.IMPLEMENTATIONS["flex"]._replace(devices=(), unsupported_reason=lambda key: None)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "flex", row)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
    dispatch._resolve_and_warn.cache_clear()
    yield
    dispatch._resolve_and_warn.cache_clear()


@pytest.mark.usefixtures("on_cpu")
class TestOnTheCPU:
    @pytest.mark.parametrize("rpe", ENCODINGS, ids=ids)
    def test_every_encoding(self, make_inputs: Callable, rpe: RPEConfig) -> None:
        assert_equals_the_reference(make_inputs(rpe, grid=(3, 4)), "flex")

    @pytest.mark.parametrize("skip", [0, 1, 2])
    @pytest.mark.parametrize("on", ["q", "k", "qk"])
    def test_every_side(self, make_inputs: Callable, on: str, skip: int) -> None:
        inputs = make_inputs(RPEConfig(on=on), grid=(4, 2), skip=skip, batch=3)
        assert_equals_the_reference(inputs, "flex", scale=0.3)

    def test_without_terms(self, make_inputs: Callable) -> None:
        assert_equals_the_reference(make_inputs(), "flex")

    def test_terms_of_different_kinds_add_up(self, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(on="qk"))
        more = make_inputs(RPEConfig(method="cross", mode="bias", on="qk", shared_heads=False))
        for name in ("rpe_q", "rpe_k"):
            inputs[name] += more[name]
        assert_equals_the_reference(inputs, "flex")

    @pytest.mark.parametrize("mode", ["contextual", "bias"])
    def test_one_table_in_several_terms(self, make_inputs: Callable, mode: str) -> None:
        inputs = make_inputs(RPEConfig(mode=mode, on="k"))
        inputs["rpe_q"] = inputs["rpe_k"] = inputs["rpe_k"] * 2
        expected, got = (
            torch.autograd.grad(irpe_attention(**inputs, impl=i).sin().sum(), inputs["rpe_k"][0][0])
            for i in ("reference", "flex")
        )
        torch.testing.assert_close(got, expected)

    def test_key_padding(self, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(on="qk"), batch=3)
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 2:5], mask[1] = True, True
        assert_equals_the_reference(inputs, "flex", key_padding_mask=mask)
        with_no_key = results(inputs, impl="flex", key_padding_mask=mask)
        assert not any(with_no_key[name][1].any() for name in ("out", *"qkv"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mode", ["contextual", "bias"])
    def test_low_precision(self, make_inputs: Callable, mode: str, dtype: torch.dtype) -> None:
        rpe = RPEConfig(mode=mode, on="qk")
        inputs = make_inputs(rpe, grid=(14, 14), head_dim=32, dtype=dtype)
        assert_as_exact_as_the_reference(inputs, "flex")

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiles_as_one_graph(self, make_inputs: Callable, backend: str) -> None:
        inputs = make_inputs(RPEConfig(method="cross", on="qk"))
        inputs["key_padding_mask"] = torch.zeros(2, 7, dtype=torch.bool)
        attention = partial(irpe_attention, impl="flex")
        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        out, expected = compiled(**inputs), attention(**inputs)
        torch.testing.assert_close(out, expected)
        if backend == "aot_eager":  # PyTorch's unfused backward there loses the lookups' gradients
            return
        leaves = list(leaves_of(inputs).values())
        torch.testing.assert_close(
            torch.autograd.grad(out.sin().sum(), leaves),
            torch.autograd.grad(expected.sin().sum(), leaves),
        )

    def test_dropout_is_refused(self, make_inputs: Callable) -> None:
        expected = (
            "impl: expected an implementation with dropout, got 'flex': FlexAttention has none"
        )
        with pytest.raises(ConfigError, match=f"^{expected}$"):
            irpe_attention(**make_inputs(), dropout_p=0.1, impl="flex")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu"}, "it runs on cuda"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
        ({"head_dim": 8}, "head_dim must be at least 16, got 8"),
        (
            {"terms": (TermSpec("v", "product", (7, 7), 1, 1.9, False),)},
            "it supports RPE on queries and keys, not on values",
        ),
    ],
)
def test_what_it_does_not_take(change: dict[str, Any], reason: str) -> None:
    key = DispatchKey(
        "cuda", torch.bfloat16, 64, (TermSpec("k", "product", (7, 7), 1, 1.9, False),)
    )
    with pytest.raises(ConfigError, match=re.escape(f"got 'flex': {reason}") + "$"):
        resolve_impl("flex", key._replace(**change))
    assert resolve_impl("flex", key).name == "flex"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["contextual", "bias"])
def test_its_kernels(make_inputs: Callable, mode: str, dtype: torch.dtype) -> None:
    rpe = RPEConfig(mode=mode, on="qk")
    inputs = make_inputs(rpe, grid=(14, 14), batch=3, head_dim=64, dtype=dtype)
    mask = torch.rand(3, 197, device="cuda") < 0.3
    mask[0] = True
    assert_as_exact_as_the_reference(inputs, "flex", "cuda", key_padding_mask=mask)
