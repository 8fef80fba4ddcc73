"""What a request comes to: explicit choices never fall back, `auto` says why."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import dispatch, irpe_attention, library, select

REASON = "there is no C++ compiler"


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the operators cannot be built."""
    monkeypatch.setattr(library, "load", lambda: library.Library(REASON, REASON, "", ""))
    dispatch._decide.cache_clear()
    yield
    dispatch._decide.cache_clear()


@pytest.mark.parametrize("impl", dispatch.IMPLEMENTATIONS)
def test_a_name_is_taken_at_its_word(impl: str) -> None:
    assert select(impl, "cpu", torch.float32) == (impl, "asked for by name")


def test_auto_on_the_cpu() -> None:
    name, why = select("auto", "cpu", torch.bfloat16)
    assert name == "cpu"
    assert why == "auto: compiled for cpu, takes bfloat16"


def test_auto_elsewhere_is_the_reference() -> None:
    q = torch.zeros(1, 1, 4, 2, device="meta")
    assert irpe_attention(q, q, q).shape == q.shape
    assert select("auto", "meta", q.dtype).name == "reference"


def test_unknown() -> None:
    with pytest.raises(
        ConfigError, match=r"^impl: expected auto or one of reference, gather, cpu, got 'fast'"
    ):
        select("fast", "cpu", torch.float32)


def test_an_implementation_of_another_device() -> None:
    expected = "^impl: expected an implementation that runs on cuda, got 'cpu': it runs on cpu$"
    with pytest.raises(ConfigError, match=expected):
        select("cpu", "cuda", torch.float32)


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
        assert [str(w.message) for w in caught] == [f"auto: cpu is missing, {REASON}"]
        assert torch.equal(out, irpe_attention(q, q, q, impl="reference"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            irpe_attention(q, q, q)
