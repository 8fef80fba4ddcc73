"""The iRPE operators as a DeepSpeed op: just-in-time and ahead-of-time builds.

IRPEBuilder().load()                     compiles on first use, into PyTorch's extension cache
DS_BUILD_IRPE=1 pip install --no-build-isolation .      compiles on installation (setup.py)
"""

import contextlib
import fcntl
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils import cpp_extension

from irpe_ds.ops.build import library
from irpe_ds.ops.build import toolchain
from irpe_ds.ops.build.toolchain import Unavailable

FINISHED = "finished"
"""The file beside a just-in-time build that is whole."""
FAILED = "failed"
"""The file that says why the last one failed: whoever waited for it need not try again."""


class IRPEBuilder(CUDAOpBuilder):
    """Builds `torch.ops.irpe_ds`: always for the CPU, for CUDA when a compiler for it is found."""

    BUILD_VAR = "DS_BUILD_IRPE"
    NAME = "irpe"

    def __init__(self) -> None:
        self.toolkit: toolchain.CUDAToolkit | None = None
        """What compiles the CUDA kernels; None when they are left out."""
        self.without_cuda = ""
        """Why they are left out."""
        try:
            self.toolkit = toolchain.cuda()
        except Unavailable as error:
            self.without_cuda = str(error)
        super().__init__(name=self.NAME)
        self.folder = toolchain.cache(self.toolkit) / self.name
        """Of the just-in-time build."""

    @property
    def build_for_cpu(self) -> bool:
        """True without a CUDA compiler. DeepSpeed sets it by the presence of a GPU, in vain."""
        return self.toolkit is None

    @build_for_cpu.setter
    def build_for_cpu(self, value: bool) -> None:
        pass

    def absolute_name(self) -> str:
        """The module of an ahead-of-time build."""
        return library.PREBUILT

    def sources(self) -> list[str]:
        """Absolute paths; nvcc compiles only files without PyTorch's headers."""
        names = ["binding.cpp", "cpu/rpe.cpp"]
        if self.toolkit:
            names += ["cuda/attention.cpp"]
            names += [
                f"cuda/{name}.cu" for name in ("rpe", "attention_forward", "attention_backward")
            ]
        return [str(toolchain.CSRC / name) for name in names]

    def include_paths(self) -> list[str]:
        """The toolkit's headers, which do not lie in the same place in every toolkit."""
        return [str(self.toolkit.include)] if self.toolkit else []

    def cxx_args(self) -> list[str]:
        """DeepSpeed's, with AVX2 rather than this very machine's instructions.

        A cache or an installation on a shared disk then serves every node of a cluster.
        """
        vector = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        return [
            *super().cxx_args(),
            "-g0",
            "-fopenmp",
            "-fno-trapping-math",  # or the exponential does not vectorise with AVX2
            *(["-mavx2", "-mfma"] if vector else []),
            *(["-DIRPE_WITH_CUDA"] if self.toolkit else []),
        ]

    def nvcc_args(self) -> list[str]:
        """No fast math, and no GPU is looked for: `toolchain.architectures` are compiled for."""
        return ["-O3", "-std=c++17", "-lineinfo", "--threads=2", *toolchain.gencode()]

    def extra_ldflags(self) -> list[str]:
        """The folder where the linker finds libcudart.so under this very name."""
        return [f"-L{self._runtime_folder()}"] if self.toolkit else []

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether a just-in-time build can be tried."""
        try:
            toolchain.cxx(), toolchain.ninja()
        except Unavailable as error:
            self.error_log = str(error)
        return self.error_log is None

    def load(self, verbose: bool = False) -> ModuleType:
        """The compiled module: prebuilt, or from the cache, or compiled now.

        Raises:
            Unavailable: no compiler, a compiler that fails, a cache that cannot be written, or a
                prebuilt module for another PyTorch or CUDA.
        """
        with library.ONE_THREAD:
            module = library.load_prebuilt() or self._load_cached() or self._compile(verbose)
            library.register()
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
        """A finished build of these sources, for which nothing need be installed or writable."""
        if self.name in self._loaded_ops:
            return self._loaded_ops[self.name]
        file = self.folder / f"{self.name}.so"
        if not (self.folder / FINISHED).exists():
            return None
        spec = importlib.util.spec_from_file_location(self.name, file)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
        except ImportError as error:
            raise Unavailable(f"{file} does not load: {error}") from error
        self._loaded_ops[self.name] = module
        return module

    def _compile(self, verbose: bool) -> ModuleType:
        if not self.is_compatible():
            raise Unavailable(str(self.error_log))
        began = time.time()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "building", "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX)  # unlike PyTorch's lock, it ends with its process
        except OSError as error:
            hint = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
            raise Unavailable(f"cannot build in {self.folder} ({error}): {hint}") from error
        with lock, self.environment():
            built_meanwhile = self._load_cached()
            if built_meanwhile is not None:
                return built_meanwhile
            failed = self.folder / FAILED
            if failed.exists() and failed.stat().st_mtime > began:
                raise Unavailable(failed.read_text())
            print(f"Building the iRPE operators, once, in {self.folder}", file=sys.stderr)
            (self.folder / "lock").unlink(missing_ok=True)  # PyTorch's, of a killed process
            try:
                module = super().load(verbose)
            except Exception as error:
                reason = _first_error(error, self.folder)
                failed.write_text(reason)
                raise Unavailable(reason) from error
            (self.folder / FINISHED).touch()
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
        """What PyTorch's build reads from the process, for as long as it runs."""
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
    """One line for what a compiler printed, all of which goes into build.log."""
    log = folder / "build.log"
    log.write_text(f"{error}\n")
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    telling = (" error: ", "cannot find ", "undefined reference")
    first = next((line for line in lines if any(sign in line for sign in telling)), lines[0])
    return f"the build failed, see {log}: {first}"


def _show_in_ds_report() -> None:
    """Add the op to DeepSpeed's report, for which it has no public way in."""
    with contextlib.suppress(Exception):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        ALL_OPS.setdefault(IRPEBuilder.NAME, IRPEBuilder())


_show_in_ds_report()
