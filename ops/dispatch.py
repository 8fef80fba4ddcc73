"""Which implementation of `irpe_attention` runs, and why."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops import cpu, flex, fused, gather, low_rank, reference
from irpe_ds.ops.build import library
from irpe_ds.ops.inputs import DispatchKey, Inputs, TermSpec
from irpe_ds.ops.tracing import traced_as_constant


class Implementation(NamedTuple):
    """One way to compute attention, and what it supports."""

    attention: Callable[[Inputs], Tensor]
    devices: tuple[str, ...] = ()
    """Supported device types; empty for all of them."""
    compiled: bool = False
    """Whether it calls the compiled operators."""
    unsupported_reason: Callable[[DispatchKey], str | None] = lambda key: None
    """Why it cannot compute such a call, whatever is installed; None when it can."""
    unavailable_reason: Callable[[DispatchKey], str | None] = lambda key: None
    """Why not here, besides what is not compiled."""


IMPLEMENTATIONS = {
    "reference": Implementation(reference.attention),
    "gather": Implementation(gather.attention, ("cpu", "cuda"), compiled=True),
    "cpu": Implementation(cpu.attention, ("cpu",), compiled=True),
    "fused": Implementation(
        fused.attention,
        ("cuda",),
        unsupported_reason=fused.unsupported_reason,
        unavailable_reason=fused.unavailable_reason,
    ),
    "flex": Implementation(flex.attention, ("cuda",), unsupported_reason=flex.unsupported_reason),
    "low_rank": Implementation(
        low_rank.attention,
        ("cpu", "cuda"),
        compiled=True,
        unsupported_reason=low_rank.unsupported_reason,
    ),
}

AUTO = {
    "cpu": {"cpu": "the fastest that was timed on a CPU"},
    "cuda": {
        "fused": "the fastest by prediction; not timed yet",
        "gather": "deterministic on any dtype; not timed yet",
    },
}
"""What `auto` tries on each device type, in this order, and why; the reference comes last. The
timings are in bench/results."""


class ResolvedImpl(NamedTuple):
    """The implementation that runs."""

    name: str
    why: str


class FallbackWarning(UserWarning):
    """`auto` runs the reference because the compiled operators are missing."""


def check_name(impl: str) -> None:
    """Raise ConfigError unless `impl` is `auto` or names an implementation."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ConfigError("impl", f"auto or one of {', '.join(IMPLEMENTATIONS)}", repr(impl))


def resolve_impl(impl: str, key: DispatchKey) -> ResolvedImpl:
    """The implementation that `impl` stands for in such a call.

    `auto` takes the compiled operators, building them first if need be, and the reference where
    that fails.

    Raises:
        ConfigError: an unknown name, or a named implementation that does not support the call. A
            name never falls back to another one.
    """
    check_name(impl)
    if impl != "auto":
        reason = unsupported_reason(impl, key)
        if reason is not None:
            expected = f"an implementation that runs on {key.device_type}"
            raise ConfigError("impl", expected, f"{impl!r}: {reason}")
        return ResolvedImpl(impl, "asked for by name")
    skipped: list[str] = []
    for name, why in AUTO.get(key.device_type, {}).items():
        reason = unsupported_reason(name, key)
        if reason is None:
            return ResolvedImpl(name, "; ".join([f"auto: {name}, {why}", *skipped]))
        skipped.append(f"not {name}: {reason}")
    why = "; ".join(skipped) or f"nothing is compiled for {key.device_type}"
    return ResolvedImpl("reference", f"auto: {why}")


def unsupported_reason(impl: str, key: DispatchKey) -> str | None:
    """Why an implementation cannot run such a call here; None when it can."""
    row = IMPLEMENTATIONS[impl]
    if row.devices and key.device_type not in row.devices:
        return f"it runs on {' and '.join(row.devices)}"
    reason = row.unsupported_reason(key)
    if reason is None and row.compiled:
        reason = library.unavailable_reason(key.device_type)
    return reason or row.unavailable_reason(key)


def attention_function(impl: str, key: DispatchKey) -> Callable[[Inputs], Tensor]:
    """The function that runs; `auto` warns, once per kind of call, when it is the reference."""
    device_type, dtype, head_dim, terms, has_dropout = key
    constants = tuple(tuple(term) for term in terms)
    name = _traced_name(impl, device_type, dtype, head_dim, constants, has_dropout)
    return IMPLEMENTATIONS[name].attention


@traced_as_constant
def _traced_name(
    impl: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    terms: tuple[Any, ...],
    has_dropout: bool,
) -> str:
    """The resolved name. torch.compile passes plain tuples of constants, not named ones."""
    specs = tuple(TermSpec(*term) for term in terms)
    key = DispatchKey(device_type, dtype, head_dim, specs, has_dropout)
    return _resolve_and_warn(_recordable(impl), key)


def _recordable(impl: str) -> str:
    """The name, or for `auto` the reference where the call is recorded to run without us.

    Raises:
        ConfigError: it cannot be recorded. torch.jit.trace ends in "unordered_map::at" in autograd
            functions such as those of `cpu` (torch 2.14), and ONNX knows PyTorch's operators alone.
    """
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        recorder, recordable = "ONNX export", ["reference"]
    elif torch.jit.is_tracing():
        recorder, recordable = "torch.jit.trace", ["reference", "gather", "low_rank"]
    elif torch.compiler.is_exporting():
        recorder, recordable = "torch.export", [*IMPLEMENTATIONS]
    else:
        return impl
    if impl == "auto":
        return "reference"
    if impl not in recordable:
        raise ConfigError("impl", f'auto or impl="reference" under {recorder}', repr(impl))
    return impl


@functools.cache
def _resolve_and_warn(impl: str, key: DispatchKey) -> str:
    resolved = resolve_impl(impl, key)
    if impl == "auto" and resolved.name == "reference" and key.device_type in AUTO:
        warnings.warn(resolved.why, FallbackWarning, stacklevel=5)
    return resolved.name
