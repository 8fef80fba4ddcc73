"""What a request comes to: explicit choices never fall back, `auto` says why."""

import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import (
    DispatchKey,
    dispatch,
    fused,
    fused_kernels,
    irpe_attention,
    resolve_impl,
)
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


def spec(
    target: str, method: str = "product", ratio: float = 1.9, *, is_bias: bool = False
) -> TermSpec:
    return TermSpec(target, method, (14, 14), 1, ratio, is_bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu"}, "it runs on cuda"),
        ({"dtype": torch.float32}, "dtype must be float16 or bfloat16, got float32"),
        ({"head_dim": 36}, "head_dim must be a multiple of 8 up to 128, got 36"),
        ({"head_dim": 136}, "head_dim must be a multiple of 8 up to 128, got 136"),
        (
            {"terms": (spec("k", "cross_rows", 20), spec("k", "cross_cols", 20))},
            "expected at most 16 column classes, got 28",
        ),
        (
            {"terms": (spec("q"), spec("k", is_bias=True))},
            "terms on queries and keys must all be contextual or all biases",
        ),
    ],
)
def test_what_the_fused_kernels_do_not_take(change: dict[str, Any], reason: str) -> None:
    key = DispatchKey("cuda", torch.bfloat16, 64, (spec("k"),))
    with pytest.raises(ConfigError, match=re.escape(f"got 'fused': {reason}")):
        resolve_impl("fused", key._replace(**change))
    assert fused.unsupported_reason(key) is None


class Gpu(NamedTuple):
    """What `fused` asks about a GPU."""

    architecture: str
    shared_bytes: int


RTX_2080, RTX_3090 = Gpu("sm_75", 64 << 10), Gpu("sm_86", 99 << 10)
RTX_4090, RTX_5090 = Gpu("sm_89", 99 << 10), Gpu("sm_120", 99 << 10)
H100 = Gpu("sm_90", 227 << 10)
NO_ROOM = "patches does not fit in 99 KiB of shared memory"


def on(targets: str, method: str = "product", ratio: float = 1.9, side: int = 14) -> list[TermSpec]:
    """Contextual terms on side x side patches and a class token."""
    methods = ["cross_rows", "cross_cols"] if method == "cross" else [method]
    return [TermSpec(x, each, (side, side), 1, ratio, False) for x in targets for each in methods]


@pytest.mark.parametrize(
    ("gpu", "terms", "dropout", "reason"),
    [
        (RTX_2080, [spec("k")], False, "it needs a GPU of compute capability 8.0 or later"),
        (RTX_3090, on("kv", "euclidean", 20), False, f"14 x 14 {NO_ROOM}"),
        (RTX_4090, on("qkv", "cross", 20, 24), False, "expected at most 16 column classes, got 44"),
        (RTX_4090, on("qkv", "cross", 1.9, 24), False, None),
        (RTX_5090, on("qkv", "cross"), False, None),
        (RTX_5090, on("qkv", "cross"), True, f"14 x 14 {NO_ROOM}"),
        (H100, [spec("k")._replace(grid=(3, 65))], False, "has rows of more than 64 patches"),
        (H100, on("qkv"), True, None),
    ],
)
def test_what_a_gpu_has_no_room_for(
    gpu: Gpu,
    terms: list[TermSpec],
    dropout: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` takes the next implementation, instead of failing in the launch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fused_kernels, "device_of", lambda index: gpu)
    monkeypatch.setattr(library, "unavailable_reason", lambda device_type: None)
    key = DispatchKey("cuda", torch.bfloat16, 64, tuple(terms), dropout)
    resolved = resolve_impl("auto", key)
    assert resolved.name == ("fused" if reason is None else "gather")
    assert reason is None or (resolved.why.count("not fused: ") and reason in resolved.why)
    for name in fused_kernels.NEEDED if reason is None else ():  # as the launch plans it
        shape = fused.kernel_shape(key, keys=name == "backward_keys")
        assert shape is not None
        fused_kernels.compile_options(name, shape, gpu.shared_bytes)


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
