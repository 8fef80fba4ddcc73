"""Which implementation of `irpe_attention` runs, and why."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops import cpu, flex, fused, gather, low_rank, reference
from irpe_ds.ops.build import library
from irpe_ds.ops.inputs import Case, Inputs, TermKind


class Implementation(NamedTuple):
    """One way to compute attention, and where it runs."""

    attention: Callable[[Inputs], Tensor]
    devices: tuple[str, ...] = ()
    """Device types; none: all of them."""
    compiled: bool = False
    """Whether it calls the compiled operators."""
    obstacle: Callable[[Case], str | None] = lambda case: None
    """Why it cannot compute a case, whatever is installed; None when it can."""


IMPLEMENTATIONS = {
    "reference": Implementation(reference.attention),
    "gather": Implementation(gather.attention, ("cpu", "cuda"), compiled=True),
    "cpu": Implementation(cpu.attention, ("cpu",), compiled=True),
    "fused": Implementation(fused.attention, ("cuda",), compiled=True, obstacle=fused.obstacle),
    "flex": Implementation(flex.attention, ("cuda",), obstacle=flex.obstacle),
    "low_rank": Implementation(
        low_rank.attention, ("cpu", "cuda"), compiled=True, obstacle=low_rank.obstacle
    ),
}

AUTO = {
    "cpu": {"cpu": "the fastest that was timed on a CPU"},
    "cuda": {
        "fused": "it moves least memory by count; not timed yet",
        "gather": "deterministic on any dtype; not timed yet",
    },
}
"""What `auto` tries on a device type, in this order, and why; after that the reference. The timings
are in bench/results."""


class Choice(NamedTuple):
    """The implementation that a request comes to."""

    name: str
    why: str


class FallbackWarning(UserWarning):
    """`auto` runs the reference because the compiled operators are missing."""


def check_name(impl: str) -> None:
    """Raise ConfigError unless there is an implementation of that name, or it is `auto`."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ConfigError("impl", f"auto or one of {', '.join(IMPLEMENTATIONS)}", repr(impl))


def select(impl: str, case: Case) -> Choice:
    """The implementation behind a name for one kind of inputs.

    `auto` takes the compiled operators, which it may build first, and the reference without them.

    Raises:
        ConfigError: no implementation of that name, or it does not run there; never a fallback.
    """
    check_name(impl)
    if impl != "auto":
        reason = obstacle(impl, case)
        if reason is not None:
            expected = f"an implementation that runs on {case.device_type}"
            raise ConfigError("impl", expected, f"{impl!r}: {reason}")
        return Choice(impl, "asked for by name")
    passed: list[str] = []
    for name, why in AUTO.get(case.device_type, {}).items():
        reason = obstacle(name, case)
        if reason is None:
            return Choice(name, "; ".join([f"auto: {name}, {why}", *passed]))
        passed.append(f"not {name}: {reason}")
    why = "; ".join(passed) or f"nothing is compiled for {case.device_type}"
    return Choice("reference", f"auto: {why}")


def obstacle(impl: str, case: Case) -> str | None:
    """Why an implementation does not run on a case; None when it does."""
    row = IMPLEMENTATIONS[impl]
    if row.devices and case.device_type not in row.devices:
        return f"it runs on {' and '.join(row.devices)}"
    reason = row.obstacle(case)
    if reason is None and row.compiled:
        reason = library.missing(case.device_type)
    return reason


def decided(impl: str, case: Case) -> str:
    """The name that `select` comes to, decided once; a fallback of `auto` is a warning."""
    device_type, dtype, head_dim, terms = case
    return _decided(impl, device_type, dtype, head_dim, tuple(tuple(kind) for kind in terms))


@torch.compiler.assume_constant_result
def _decided(
    impl: str, device_type: str, dtype: torch.dtype, head_dim: int, terms: tuple[Any, ...]
) -> str:
    """For torch.compile, which hands on plain tuples of constants."""
    kinds = tuple(TermKind(*kind) for kind in terms)
    return _decide(impl, Case(device_type, dtype, head_dim, kinds))


@functools.cache
def _decide(impl: str, case: Case) -> str:
    choice = select(impl, case)
    if impl == "auto" and choice.name == "reference" and case.device_type in AUTO:
        warnings.warn(choice.why, FallbackWarning, stacklevel=5)
    return choice.name
