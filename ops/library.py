"""The compiled operators `torch.ops.irpe_ds`: found ready, or built, or why not."""

import functools
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from irpe_ds.errors import ConfigError

PREBUILT = "irpe_ds.ops.irpe_op"
"""The module of an ahead-of-time build; `irpe_op.json` beside it says what it was built for."""


class Unavailable(Exception):
    """The operators cannot be had here; the message says why and what would help, in one line."""


class Library(NamedTuple):
    """Whether the operators can be called, for each device type."""

    cpu: str | None
    """Why not on the CPU; None when they can."""
    cuda: str | None
    """Why not on CUDA; None when they can."""
    origin: str
    """Where they come from: the file that was loaded, empty without one."""


@functools.cache
def load() -> Library:
    """Load the operators: prebuilt ones, else those of `IRPEBuilder`, which may compile them."""
    try:
        module = load_prebuilt()
        without_cuda = _built_for()["without_cuda"] if module else ""
        if module is None:
            module, without_cuda = _build()
    except Unavailable as error:
        return Library(str(error), str(error), "")
    from irpe_ds.ops import gather

    gather.register()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("irpe_ds::gather", "CUDA")
    return Library(None, None if has_cuda else without_cuda, str(module.__file__))


def require(device_type: str) -> None:
    """Raise ConfigError unless the operators can be called on tensors of this device type."""
    reason = missing(device_type)
    if reason is not None:
        raise ConfigError(
            "device", "one that the iRPE operators run on", f"{device_type}: {reason}"
        )


@torch.compiler.assume_constant_result
def missing(device_type: str) -> str | None:
    """Why the operators cannot be called on tensors of this device type; None when they can."""
    if device_type not in ("cpu", "cuda"):
        return "there are kernels for cpu and cuda"
    return getattr(load(), device_type)


def load_prebuilt() -> ModuleType | None:
    """The module of an ahead-of-time build, if there is one.

    Raises:
        Unavailable: it was built for another PyTorch or CUDA than is installed.
    """
    if find_spec(PREBUILT) is None:
        return None
    built, here = _built_for(), versions()
    if any(built[name] != here[name] for name in here):
        built_for, found = (
            ", ".join(f"{name} {of[name]}" for name in here) for of in (built, here)
        )
        raise Unavailable(f"prebuilt for {built_for}, but here is {found}: install irpe-ds again")
    try:
        return importlib.import_module(PREBUILT)
    except ImportError as error:
        raise Unavailable(f"the prebuilt operators do not load: {error}") from error


def versions() -> dict[str, str | None]:
    """What compiled operators depend on."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda}


def _built_for() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("irpe_op.json").read_text())


def _build() -> tuple[ModuleType, str]:
    try:
        from irpe_ds.ops.builder import IRPEBuilder
    except ImportError as error:
        raise Unavailable(f"to build them DeepSpeed is needed ({error})") from error
    builder = IRPEBuilder()
    return builder.load(), builder.without_cuda
