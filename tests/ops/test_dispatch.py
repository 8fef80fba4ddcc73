"""What a request comes to: explicit choices never fall back, `auto` says why."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import Case, dispatch, fused, irpe_attention, select
from irpe_ds.ops.build import library
from irpe_ds.ops.inputs import TermKind

CASE = Case("cpu", torch.float32, 64, ())
REASON = "there is no C++ compiler"


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the operators cannot be built."""
    monkeypatch.setattr(library, "load", lambda: library.Library(REASON, REASON, "", ""))
    dispatch._decide.cache_clear()
    yield
    dispatch._decide.cache_clear()


@pytest.mark.parametrize("impl", ["reference", "gather", "cpu"])
def test_a_name_is_taken_at_its_word(impl: str) -> None:
    assert select(impl, CASE) == (impl, "asked for by name")


def test_auto_on_the_cpu() -> None:
    assert select("auto", CASE) == ("cpu", "auto: cpu, the fastest that was timed on a CPU")


def test_auto_elsewhere_is_the_reference() -> None:
    q = torch.zeros(1, 1, 4, 2, device="meta")
    assert irpe_attention(q, q, q).shape == q.shape
    why = "auto: nothing is compiled for meta"
    assert select("auto", CASE._replace(device_type="meta")) == ("reference", why)


def test_unknown() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^impl: expected auto or one of reference, .*, low_rank, got 'fast'$",
    ):
        select("fast", CASE)


def test_an_implementation_of_another_device() -> None:
    expected = "^impl: expected an implementation that runs on cuda, got 'cpu': it runs on cpu$"
    with pytest.raises(ConfigError, match=expected):
        select("cpu", CASE._replace(device_type="cuda"))


def kind(target: str, num_used: int) -> TermKind:
    return TermKind(target, "product", num_used, is_bias=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu"}, "it runs on cuda"),
        ({"dtype": torch.float32}, "it takes float16 and bfloat16, not float32"),
        ({"head_dim": 48}, "it takes 32 or 64 numbers per head, not 48"),
        (
            {"terms": (kind("q", 50), kind("v", 129))},
            "it takes at most 2 terms with 128 buckets in use on v, not 1 with 129",
        ),
        (
            {"terms": (kind("k", 8), kind("k", 8), kind("k", 8))},
            "it takes at most 2 terms with 128 buckets in use on k, not 3 with 24",
        ),
    ],
)
def test_what_the_fused_kernels_do_not_take(change: dict[str, Any], reason: str) -> None:
    case = Case("cuda", torch.bfloat16, 64, (kind("k", 50),))
    with pytest.raises(ConfigError, match=re.escape(f"got 'fused': {reason}")):
        select("fused", case._replace(**change))
    assert fused.obstacle(case) is None


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
