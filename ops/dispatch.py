"""Which implementation of `irpe_attention` runs, and why."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops import cpu, gather, library, reference

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.attention,
    "gather": gather.attention,
    "cpu": cpu.attention,
}
NEEDS = {"gather": ("cpu", "cuda"), "cpu": ("cpu",)}
"""The device types of implementations that call the compiled operators."""

COMPILED = {"cpu": "cpu", "cuda": "gather"}
"""What `auto` takes on a device type when it can be had; on the CPU it is the fastest that was
measured (bench/results), on CUDA the deterministic one. The reference runs everywhere."""


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


def select(impl: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The implementation behind a name for tensors of one device type and dtype.

    `auto` takes the compiled operators, which it may build first, and the reference without them.

    Raises:
        ConfigError: no implementation of that name, or it does not run there; never a fallback.
    """
    check_name(impl)
    if impl != "auto":
        reason = obstacle(impl, device_type)
        if reason is not None:
            expected = f"an implementation that runs on {device_type}"
            raise ConfigError("impl", expected, f"{impl!r}: {reason}")
        return Choice(impl, "asked for by name")
    name = COMPILED.get(device_type)
    if name is None:
        return Choice("reference", f"auto: nothing is compiled for {device_type}")
    reason = obstacle(name, device_type)
    if reason is not None:
        return Choice("reference", f"auto: {name} is missing, {reason}")
    return Choice(name, f"auto: compiled for {device_type}, takes {dtype}".replace("torch.", ""))


def obstacle(impl: str, device_type: str) -> str | None:
    """Why an implementation does not run on a device type; None when it does."""
    if impl not in NEEDS:
        return None
    if device_type not in NEEDS[impl]:
        return f"it runs on {' and '.join(NEEDS[impl])}"
    return library.missing(device_type)


@torch.compiler.assume_constant_result
def decided(impl: str, device_type: str, dtype: torch.dtype) -> str:
    """The name that `select` comes to, decided once; a fallback of `auto` is a warning."""
    return _decide(impl, device_type, dtype)


@functools.cache
def _decide(impl: str, device_type: str, dtype: torch.dtype) -> str:
    choice = select(impl, device_type, dtype)
    if impl == "auto" and choice.name != COMPILED.get(device_type, "reference"):
        warnings.warn(choice.why, FallbackWarning, stacklevel=4)
    return choice.name
