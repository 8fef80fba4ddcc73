"""The compiled operators `torch.ops.irpe_ds`: found ready, or built, or why not."""

import functools
import importlib
import json
import threading
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops.build import toolchain
from irpe_ds.ops.build.toolchain import Unavailable

PREBUILT = "irpe_ds.ops.irpe_op"
"""The module of an ahead-of-time build; `irpe_op.json` beside it says what it was built for."""


class Library(NamedTuple):
    """Whether the operators can be called, for each device type."""

    cpu: str | None
    """Why not on the CPU; None when they can."""
    cuda: str | None
    """Why not on CUDA; None when there are kernels for it."""
    architectures: str
    """What GPUs these kernels are for, as TORCH_CUDA_ARCH_LIST writes it."""
    origin: str
    """Where they come from: the file that was loaded, empty without one."""


ONE_THREAD = threading.RLock()
"""Held while operators are looked for and built; threads that come meanwhile wait."""


def load() -> Library:
    """Load the operators, once: prebuilt ones, else `IRPEBuilder`'s, which may compile them."""
    with ONE_THREAD:
        return _load()


def is_loaded() -> bool:
    """Whether `load` was called before, with success or without."""
    return _load.cache_info().currsize > 0


@functools.cache
def _load() -> Library:
    try:
        module = load_prebuilt()
        if module is not None:
            built = _built_for()
            without_cuda, architectures = built["without_cuda"], built["architectures"]
        else:
            module, without_cuda, architectures = _build()
    except Unavailable as error:
        return Library(str(error), str(error), "", "")
    register()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("irpe_ds::gather", "CUDA")
    return Library(None, None if has_cuda else without_cuda, architectures, str(module.__file__))


def register() -> None:
    """Tell PyTorch the shapes and the gradients of the operators, once they are loaded."""
    from irpe_ds.ops import fused, gather

    gather.register()
    fused.register()


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
    return load().cpu if device_type == "cpu" else _missing_on_gpu()


@functools.cache
def _missing_on_gpu() -> str | None:
    """Asked only about tensors on a GPU, because it starts CUDA in this process."""
    found = load()
    if found.cuda is not None or not torch.cuda.is_available():
        return found.cuda
    capability = torch.cuda.get_device_capability()
    if toolchain.runs_on(capability, found.architectures):
        return None
    gpu = f"{torch.cuda.get_device_name()} of compute capability {capability[0]}.{capability[1]}"
    hint = "set TORCH_CUDA_ARCH_LIST and build again"
    return f"the kernels are for {found.architectures}, not for {gpu}: {hint}"


def load_prebuilt() -> ModuleType | None:
    """The module of an ahead-of-time build, if there is one.

    Raises:
        Unavailable: it was built for another PyTorch or CUDA than is installed.
    """
    if find_spec(PREBUILT) is None:
        return None
    built, here = _built_for(), needs()
    if any(built[name] != here[name] for name in here):
        built_for, found = (
            ", ".join(f"{name} {of[name]}" for name in here) for of in (built, here)
        )
        raise Unavailable(f"prebuilt for {built_for}, but here is {found}: install irpe-ds again")
    try:
        return importlib.import_module(PREBUILT)
    except ImportError as error:
        raise Unavailable(f"the prebuilt operators do not load: {error}") from error


def needs() -> dict[str, str | None]:
    """What prebuilt operators depend on, as far as it can change under them."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "sources": toolchain.sources()}


def _built_for() -> dict[str, Any]:
    return json.loads(Path(__file__).parents[1].joinpath("irpe_op.json").read_text())


def _build() -> tuple[ModuleType, str, str]:
    try:
        from irpe_ds.ops.build.builder import IRPEBuilder
    except Exception as error:  # DeepSpeed raises many kinds where it finds no CUDA
        raise Unavailable(f"to build them DeepSpeed is needed ({error})") from error
    builder = IRPEBuilder()
    return builder.load(), builder.without_cuda, toolchain.architectures()
