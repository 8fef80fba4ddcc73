"""The compiled operators `torch.ops.irpe_ds`: loaded, built first if need be, or why not."""

import functools
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from irpe_ds.ops.build import operators, prebuilt, toolchain
from irpe_ds.ops.build.toolchain import Unavailable

if TYPE_CHECKING:
    from irpe_ds.ops.build.extension import ExtensionBuilder


class Library(NamedTuple):
    """Whether the operators can be called, for each device type."""

    cpu: str | None
    """Why not on the CPU; None when they can."""
    cuda: str | None
    """Why not on CUDA; None when there are kernels for it."""
    architectures: str
    """The GPUs that these kernels support, in the format of TORCH_CUDA_ARCH_LIST."""
    origin: str
    """The file that was loaded; empty without one."""


def load() -> Library:
    """Load the operators, once: prebuilt ones, else those of `ExtensionBuilder`, or compile."""
    with prebuilt.LOCK:
        return _load()


def is_loaded() -> bool:
    """Whether `load` was called before, successfully or not."""
    return _load.cache_info().currsize > 0


@functools.cache
def _load() -> Library:
    try:
        module = prebuilt.load()
        if module is not None:
            info = prebuilt.built_for()
            without_cuda, architectures = info["without_cuda"], info["architectures"]
        else:
            module, without_cuda, architectures = _build()
    except Unavailable as error:
        return Library(str(error), str(error), "", "")
    operators.register()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("irpe_ds::gather", "CUDA")
    return Library(None, None if has_cuda else without_cuda, architectures, str(module.__file__))


def _build() -> tuple[ModuleType, str, str]:
    try:  # a slow import
        from irpe_ds.ops.build.extension import ExtensionBuilder
    except ImportError as error:
        raise Unavailable(f"building the operators needs setuptools ({error})") from error
    builder = ExtensionBuilder()
    architectures = toolchain.architectures() if builder.toolkit else ""
    module = builder.cached() or _with_deepspeed(builder).load()
    return module, builder.without_cuda, architectures


def _with_deepspeed(builder: "ExtensionBuilder") -> "ExtensionBuilder":
    """DeepSpeed's builder where it is installed; only to compile, as it takes seconds to import."""
    try:
        from irpe_ds.ops.build.builder import IRPEBuilder
    except Exception:  # not installed, or no CUDA found, for which DeepSpeed raises many kinds
        return builder
    return IRPEBuilder()


def unavailable_reason(device_type: str) -> str | None:
    """Why the operators cannot be called on tensors of this device type; None when they can."""
    if device_type not in ("cpu", "cuda"):
        return "there are kernels for cpu and cuda"
    return load().cpu if device_type == "cpu" else _unavailable_on_gpu()


@functools.cache
def _unavailable_on_gpu() -> str | None:
    """Called only for tensors on a GPU, because it initialises CUDA in this process."""
    library = load()
    if library.cuda is not None or not torch.cuda.is_available():
        return library.cuda
    capability = torch.cuda.get_device_capability()
    if toolchain.runs_on(capability, library.architectures):
        return None
    gpu = f"{torch.cuda.get_device_name()} of compute capability {capability[0]}.{capability[1]}"
    hint = "set TORCH_CUDA_ARCH_LIST and build again"
    return f"the kernels are for {library.architectures}, not for {gpu}: {hint}"
