"""The iRPE operators as a DeepSpeed op; and DeepSpeed's own ops, built as safely as ours.

IRPEBuilder().load()                     compiles on first use, into PyTorch's extension cache
DS_BUILD_IRPE=1 pip install --no-build-isolation .      compiles on installation (setup.py)
"""

import contextlib
import functools
import sys
from pathlib import Path
from types import ModuleType

from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder
from torch.utils import cpp_extension

from irpe_ds.errors import ConfigError
from irpe_ds.ops.build import folders, prebuilt, toolchain
from irpe_ds.ops.build.extension import ExtensionBuilder, first_error
from irpe_ds.ops.build.toolchain import Unavailable


class IRPEBuilder(ExtensionBuilder, CUDAOpBuilder):
    """The same sources, options and cache as without DeepSpeed; DeepSpeed compiles them."""

    BUILD_VAR = "DS_BUILD_IRPE"
    NAME = ExtensionBuilder.name
    jit_load = OpBuilder.jit_load  # unguarded: `ExtensionBuilder` has the lock

    def __init__(self) -> None:
        ExtensionBuilder.__init__(self)
        CUDAOpBuilder.__init__(self, name=self.NAME)

    @property
    def build_for_cpu(self) -> bool:
        """True without a CUDA compiler.

        DeepSpeed 0.16 to 0.19 sets it when there is no GPU, which would leave the kernels out on a
        login node or in CI. It can become an attribute when DeepSpeed no longer sets it.
        """
        return self.toolkit is None

    @build_for_cpu.setter
    def build_for_cpu(self, value: bool) -> None:
        pass

    def absolute_name(self) -> str:
        """The module of an ahead-of-time build."""
        return prebuilt.MODULE

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether a just-in-time build can be attempted."""
        try:
            toolchain.cxx(), toolchain.ninja()
        except Unavailable as error:
            self.error_log = str(error)
        return self.error_log is None


@functools.cache
def guard_deepspeed_builds() -> None:
    """Let DeepSpeed's own ops be built as this one: see `folders.locked` and `folders.check`.

    Ranks of a host build them at the same time. DeepSpeed 0.16 to 0.19 leaves the rest to PyTorch:
    up to torch 2.13 a killed build stops every later one for good, and a hung one does so still.
    An op that cannot be built raises ConfigError.
    """
    build = OpBuilder.jit_load
    leaves_locks = hasattr(cpp_extension, "FileBaton")

    def jit_load(builder: OpBuilder, verbose: bool = True) -> ModuleType:
        try:
            with folders.not_writable_by_all():
                folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
                folders.check(folder, folder.parent)
                library = folder / f"{builder.name}.so"
                if folders.is_complete(library) and not leaves_locks:
                    return build_in(folder, builder, verbose)  # many ranks, each a second
                with folders.locked(folder):
                    if not library.exists():
                        what = f"DeepSpeed's {builder.name}"
                        print(f"Building {what}, once, in {folder}", file=sys.stderr)
                    module = build_in(folder, builder, verbose)
                    with contextlib.suppress(OSError):  # there will be a lock the next time too
                        folders.mark_complete(library)
                    return module
        except (OSError, Unavailable) as error:
            raise ConfigError(f"cannot build DeepSpeed's {builder.name}: {error}") from error

    def build_in(folder: Path, builder: OpBuilder, verbose: bool) -> ModuleType:
        try:
            return build(builder, verbose)
        except Exception as error:
            raise Unavailable(first_error(error, folder)) from error

    OpBuilder.jit_load = jit_load


def _show_in_ds_report() -> None:
    """Add the op to `ds_report`. DeepSpeed 0.16 to 0.19 has no public way to register one."""
    with contextlib.suppress(Exception):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        ALL_OPS.setdefault(IRPEBuilder.NAME, IRPEBuilder())


_show_in_ds_report()
