"""The iRPE operators as a DeepSpeed op: just-in-time and ahead-of-time builds.

IRPEBuilder().load()                     compiles on first use, into PyTorch's extension cache
DS_BUILD_IRPE=1 pip install --no-build-isolation .      compiles on installation (setup.py)
"""

import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder
from torch.utils import cpp_extension

from irpe_ds.errors import ConfigError
from irpe_ds.files import open_own, read_regular
from irpe_ds.ops.build import folders, operators, prebuilt, toolchain
from irpe_ds.ops.build.toolchain import Unavailable


class IRPEBuilder(CUDAOpBuilder):
    """Builds `torch.ops.irpe_ds`: always for the CPU, for CUDA when a compiler for it is found."""

    BUILD_VAR = "DS_BUILD_IRPE"
    NAME = "irpe"
    jit_load = OpBuilder.jit_load  # unguarded: `_compile` has the lock

    def __init__(self) -> None:
        self.toolkit: toolchain.CUDAToolkit | None = None
        """Compiles the CUDA kernels; None when they are not built."""
        self.without_cuda = ""
        """Why they are not built."""
        try:
            self.toolkit = toolchain.cuda()
        except Unavailable as error:
            self.without_cuda = str(error)
        super().__init__(name=self.NAME)
        self.folder = toolchain.cache(self.toolkit) / self.name
        """The folder of the just-in-time build."""
        self._root = self.folder.parents[1]

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

    def sources(self) -> list[str]:
        """Absolute paths; the files for nvcc include none of PyTorch's headers."""
        names = ["binding.cpp", "cpu/rpe.cpp"]
        if self.toolkit:
            names.append("cuda/rpe.cu")
        return [str(toolchain.CSRC / name) for name in names]

    def include_paths(self) -> list[str]:
        """The toolkit's headers, whose folder differs between toolkits."""
        return [str(self.toolkit.include)] if self.toolkit else []

    def cxx_args(self) -> list[str]:
        """DeepSpeed's, but AVX2 instead of the instructions of this machine, and no C++ standard.

        With AVX2 a cache or an installation on a shared disk serves every node of a cluster.
        DeepSpeed 0.16 asks for C++17, which the headers of torch 2.14 do not compile with;
        without a standard torch.utils.cpp_extension adds the one that its headers need. Keep
        DeepSpeed's once the oldest supported one knows the newest torch.
        """
        vector = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        return [
            *(option for option in super().cxx_args() if not option.startswith("-std=")),
            "-g0",
            "-fopenmp",
            "-fno-trapping-math",  # else g++ does not vectorise the exponential with AVX2
            *(["-mavx2", "-mfma"] if vector else []),
            *(["-DIRPE_WITH_CUDA"] if self.toolkit else []),
        ]

    def nvcc_args(self) -> list[str]:
        """For `toolchain.architectures`, with no fast math; torch adds the C++ standard.

        DeepSpeed's own options hold fast math, and the architecture of a GPU that must be present.
        """
        return ["-O3", "-lineinfo", "--threads=2", *toolchain.gencode()]

    def extra_ldflags(self) -> list[str]:
        """The folder where the linker finds libcudart.so under exactly this name."""
        return [f"-L{self._runtime_folder()}"] if self.toolkit else []

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether a just-in-time build can be attempted."""
        try:
            toolchain.cxx(), toolchain.ninja()
        except Unavailable as error:
            self.error_log = str(error)
        return self.error_log is None

    def load(self, verbose: bool = False) -> ModuleType:
        """The compiled module: prebuilt, or from the cache, or compiled now.

        Raises:
            Unavailable: no compiler, a failed compilation, a cache that cannot be written, or a
                prebuilt module for another PyTorch or CUDA.
        """
        with prebuilt.LOCK:
            module = prebuilt.load() or self._load_cached() or self._compile(verbose)
            operators.register()
            return module

    def builder(self) -> Any:
        """The setuptools extension of an ahead-of-time build; build it within `environment`."""
        make = cpp_extension.CUDAExtension if self.toolkit else cpp_extension.CppExtension
        with self.environment():
            return make(
                name=self.absolute_name(),
                sources=[os.path.relpath(source) for source in self.sources()],
                include_dirs=self.include_paths(),
                extra_compile_args={"cxx": self.cxx_args(), "nvcc": self.nvcc_args()},
                extra_link_args=self.extra_ldflags(),
            )

    def _load_cached(self) -> ModuleType | None:
        """A finished build of these sources; needs no compiler and no writable cache."""
        if self.name in self._loaded_ops:
            return self._loaded_ops[self.name]
        file = self.folder / f"{self.name}.so"
        if not folders.is_complete(file):
            return None
        for path in (self.folder, file, file.with_name(folders.FINISHED)):
            folders.check(path, self._root)
        spec = importlib.util.spec_from_file_location(self.name, file)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
        except ImportError as error:
            raise Unavailable(f"cannot load {file}: {error}") from error
        self._loaded_ops[self.name] = module
        return module

    def _compile(self, verbose: bool) -> ModuleType:
        if not self.is_compatible():
            raise Unavailable(str(self.error_log))
        began = time.time()
        try:
            with folders.not_writable_by_all():
                self.folder.mkdir(parents=True, exist_ok=True)
                folders.check(self.folder, self._root)
                with folders.locked(self.folder), self.environment():
                    return self._load_cached() or self._compile_alone(verbose, began)
        except OSError as error:
            hint = "set TORCH_EXTENSIONS_DIR to a writable folder"
            raise Unavailable(f"cannot build in {self.folder} ({error}): {hint}") from error

    def _compile_alone(self, verbose: bool, began: float) -> ModuleType:
        """Compile while the folder is locked, unless another tried and failed since `began`."""
        failed, library = self.folder / folders.FAILED, self.folder / f"{self.name}.so"
        if failed.exists() and failed.lstat().st_mtime > began:
            raise Unavailable(read_regular(failed, 10_000).decode(errors="replace"))
        if os.path.lexists(self.folder / folders.FINISHED):
            print(f"{library} is damaged: it is built again", file=sys.stderr)
        folders.clear(self.folder)
        print(f"Building the iRPE operators, once, in {self.folder}", file=sys.stderr)
        try:
            module = super().load(verbose)
        except Exception as error:
            reason = _first_error(error, self.folder)
            with open_own(failed, "w") as file:
                file.write(reason)
            raise Unavailable(reason) from error
        folders.mark_complete(library)
        return module

    def _runtime_folder(self) -> Path:
        assert self.toolkit is not None
        link = self.folder.parent / "lib" / "libcudart.so"
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.resolve() != self.toolkit.runtime.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(self.toolkit.runtime.resolve())
        return link.parent

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Set what PyTorch's build reads from this process, and restore it afterwards."""
        variables = {
            "PATH": toolchain.path_with_scripts(),
            "TORCH_EXTENSIONS_DIR": str(self.folder.parent),
        }
        before = {name: os.environ.get(name) for name in variables}
        home, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, None
        if self.toolkit:
            cpp_extension.CUDA_HOME = str(self.toolkit.home)
        os.environ.update(variables)
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = home
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _first_error(error: Exception, folder: Path) -> str:
    """The compiler's first error, in one line; its whole output is written to build.log."""
    log = folder / "build.log"
    with open_own(log, "w") as file:
        file.write(f"{error}\n")
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    telling = (" error: ", "cannot find ", "undefined reference")
    first = next((line for line in lines if any(sign in line for sign in telling)), lines[0])
    return f"the build failed, see {log}: {first}"


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
            raise Unavailable(_first_error(error, folder)) from error

    OpBuilder.jit_load = jit_load


def _show_in_ds_report() -> None:
    """Add the op to `ds_report`. DeepSpeed 0.16 to 0.19 has no public way to register one."""
    with contextlib.suppress(Exception):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        ALL_OPS.setdefault(IRPEBuilder.NAME, IRPEBuilder())


_show_in_ds_report()
