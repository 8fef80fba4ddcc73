"""What a request comes to: explicit choices never fall back, `auto` says why."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import DispatchKey, dispatch, fused, irpe_attention, resolve_impl
from irpe_ds.ops.build import library
from irpe_ds.ops.inputs import TermSpec

CASE = DispatchKey("cpu", torch.float32, 64, ())
REASON = "there is no C++ compiler"


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the operators cannot be built."""
    monkeypatch.setattr(library, "load", lambda: library.Library(REASON, REASON, "", ""))
    dispatch._resolve_and_warn.cache_clear()
    yield
    dispatch._resolve_and_warn.cache_clear()


@pytest.mark.parametrize("impl", ["reference", "gather", "cpu"])
def test_a_name_is_taken_at_its_word(impl: str) -> None:
    assert resolve_impl(impl, CASE) == (impl, "asked for by name")


def test_auto_on_the_cpu() -> None:
    assert resolve_impl("auto", CASE) == ("cpu", "auto: cpu, the fastest that was timed on a CPU")


def test_auto_elsewhere_is_the_reference() -> None:
    q = torch.zeros(1, 1, 4, 2, device="meta")
    assert irpe_attention(q, q, q).shape == q.shape
    why = "auto: nothing is compiled for meta"
    assert resolve_impl("auto", CASE._replace(device_type="meta")) == ("reference", why)


def test_unknown() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^impl: expected auto or one of reference, .*, low_rank, got 'fast'$",
    ):
        resolve_impl("fast", CASE)


def test_an_implementation_of_another_device() -> None:
    expected = "^impl: expected an implementation that runs on cuda, got 'cpu': it runs on cpu$"
    with pytest.raises(ConfigError, match=expected):
        resolve_impl("cpu", CASE._replace(device_type="cuda"))


def spec(target: str, num_used: int) -> TermSpec:
    return TermSpec(target, "product", num_used, is_bias=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu"}, "it runs on cuda"),
        ({"dtype": torch.float32}, "dtype must be float16 or bfloat16, got float32"),
        ({"head_dim": 48}, "head_dim must be 32 or 64, got 48"),
        (
            {"terms": (spec("q", 50), spec("v", 129))},
            "rpe_v must have at most 2 terms with 128 used buckets, got 1 with 129",
        ),
        (
            {"terms": (spec("k", 8), spec("k", 8), spec("k", 8))},
            "rpe_k must have at most 2 terms with 128 used buckets, got 3 with 24",
        ),
    ],
)
def test_what_the_fused_kernels_do_not_take(change: dict[str, Any], reason: str) -> None:
    key = DispatchKey("cuda", torch.bfloat16, 64, (spec("k", 50),))
    with pytest.raises(ConfigError, match=re.escape(f"got 'fused': {reason}")):
        resolve_impl("fused", key._replace(**change))
    assert fused.unsupported_reason(key) is None


@pytest.mark.usefixtures("without_operators")
class TestWithoutOperators:
    @pytest.mark.parametrize("impl", ["cpu", "gather"])
    def test_an_explicit_choice_never_falls_back(self, impl: str) -> None:
        q = torch.zeros(1, 1, 4, 2)
        expected = f"^impl: expected an implementation that runs on cpu, got '{impl}': {REASON}"
        with pytest.raises(ConfigError, match=expected.replace("+", r"\+")):
            irpe_attention(q, q, q, impl=impl)

    def test_auto_runs_the_reference_and_says_so_once(self) -> None:
        q = torch.randn(1, 1, 4, 2)
        with pytest.warns(dispatch.FallbackWarning) as caught:
            out = irpe_attention(q, q, q)
        assert [str(w.message) for w in caught] == [f"auto: not cpu: {REASON}"]
        assert torch.equal(out, irpe_attention(q, q, q, impl="reference"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            irpe_attention(q, q, q)
