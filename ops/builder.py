"""The iRPE operators as a DeepSpeed op: just-in-time and ahead-of-time builds.

IRPEBuilder().load()                     compiles on first use, into PyTorch's extension cache
DS_BUILD_IRPE=1 pip install --no-build-isolation .      compiles on installation (setup.py)
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils import cpp_extension

from irpe_ds.ops import library, toolchain
from irpe_ds.ops.library import Unavailable

CSRC = Path(__file__).parent / "csrc"


class IRPEBuilder(CUDAOpBuilder):
    """Builds `torch.ops.irpe_ds`: always for the CPU, for CUDA when a compiler for it is found."""

    BUILD_VAR = "DS_BUILD_IRPE"
    NAME = "irpe"

    def __init__(self) -> None:
        super().__init__(name=self.NAME)
        self.toolkit: toolchain.CUDAToolkit | None = None
        """What compiles the CUDA kernels; None when they are left out."""
        self.without_cuda = ""
        """Why they are left out."""
        try:
            self.toolkit = toolchain.cuda()
        except Unavailable as error:
            self.without_cuda = str(error)
        self.build_for_cpu = self.toolkit is None
        self.cache = toolchain.cache()

    def absolute_name(self) -> str:
        """The module of an ahead-of-time build."""
        return library.PREBUILT

    def sources(self) -> list[str]:
        """Absolute paths; nvcc compiles only files without PyTorch's headers."""
        names = ["binding.cpp", "cpu/rpe.cpp", *(["cuda/rpe.cu"] if self.toolkit else [])]
        return [str(CSRC / name) for name in names]

    def cxx_args(self) -> list[str]:
        """DeepSpeed's, with AVX2 rather than this very machine's instructions.

        A cache or an installation on a shared disk then serves every node of a cluster. What
        PyTorch it is compiled for is among them, so that another one compiles again.
        """
        vector = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        return [
            *super().cxx_args(),
            "-g0",
            "-fopenmp",
            "-fno-trapping-math",  # or the exponential does not vectorise with AVX2
            *(["-mavx2", "-mfma"] if vector else []),
            *(["-DIRPE_WITH_CUDA"] if self.toolkit else []),
            f"-DIRPE_TORCH_VERSION={torch.__version__}",
        ]

    def nvcc_args(self) -> list[str]:
        """No fast math, and no GPU is looked for: TORCH_CUDA_ARCH_LIST says what is compiled."""
        return ["-O3", "-std=c++17", "-lineinfo", "--threads=2"]

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
        prebuilt = library.load_prebuilt()
        if prebuilt is not None:
            return prebuilt
        if not self.is_compatible():
            raise Unavailable(str(self.error_log))
        folder = self.cache / self.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_process(folder), self.environment():
                if not (folder / f"{self.name}.so").exists():
                    print(f"Building the iRPE operators, once, in {folder}", file=sys.stderr)
                return super().load(verbose)
        except OSError as error:
            hint = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
            raise Unavailable(f"cannot build in {folder} ({error}): {hint}") from error
        except Exception as error:
            raise Unavailable(_first_error(error, folder)) from error

    def builder(self) -> Any:
        """The setuptools extension of an ahead-of-time build; build it within `environment`."""
        make = cpp_extension.CUDAExtension if self.toolkit else cpp_extension.CppExtension
        with self.environment():
            return make(
                name=self.absolute_name(),
                sources=[os.path.relpath(source) for source in self.sources()],
                extra_compile_args={"cxx": self.cxx_args(), "nvcc": self.nvcc_args()},
                extra_link_args=self.extra_ldflags(),
            )

    def _runtime_folder(self) -> Path:
        assert self.toolkit is not None
        link = self.cache / "lib" / "libcudart.so"
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
            "TORCH_EXTENSIONS_DIR": str(self.cache),
            "TORCH_CUDA_ARCH_LIST": toolchain.architectures(),
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


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """One process at a time builds in a folder; PyTorch's own lock of a killed one is removed.

    PyTorch waits for its lock file for ever; this lock ends with the process that holds it.
    """
    with open(folder / "building", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _first_error(error: Exception, folder: Path) -> str:
    """One line for what a compiler printed, all of which goes into build.log."""
    log = folder / "build.log"
    log.write_text(f"{error}\n")
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    first = next((line for line in lines if " error: " in line), lines[0])
    return f"the build failed, see {log}: {first}"


def _show_in_ds_report() -> None:
    """Add the op to DeepSpeed's report, for which it has no public way in."""
    with contextlib.suppress(Exception):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        ALL_OPS.setdefault(IRPEBuilder.NAME, IRPEBuilder())


_show_in_ds_report()
