"""`torch.ops.irpe_ds` as a C++ extension of PyTorch: sources, options, building, loading."""

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.utils import cpp_extension

from irpe_ds.files import open_own, read_regular
from irpe_ds.ops.build import folders, operators, prebuilt, toolchain
from irpe_ds.ops.build.toolchain import Unavailable


class ExtensionBuilder:
    """Builds it: always for the CPU, for CUDA when a compiler for it is found."""

    name = "irpe"
    _loaded: ClassVar[dict[str, ModuleType]] = {}

    def __init__(self) -> None:
        self.toolkit: toolchain.CUDAToolkit | None = None
        """Compiles the CUDA kernels; None when they are not built."""
        self.without_cuda = ""
        """Why they are not built."""
        try:
            self.toolkit = toolchain.cuda()
        except Unavailable as error:
            self.without_cuda = str(error)
        self.folder = toolchain.cache(self.toolkit) / self.name
        """The folder of the just-in-time build."""
        self._root = self.folder.parents[1]

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
        """AVX2 instead of the instructions of this machine; torch adds the C++ standard.

        With AVX2 a cache or an installation on a shared disk serves every node of a cluster.
        """
        vector = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        return [
            *("-O3", "-g0", "-fopenmp"),
            "-fno-trapping-math",  # else g++ does not vectorise the exponential with AVX2
            *(["-mavx2", "-mfma"] if vector else []),
            *(["-DIRPE_WITH_CUDA"] if self.toolkit else []),
        ]

    def nvcc_args(self) -> list[str]:
        """For `toolchain.architectures`, with no fast math; torch adds the C++ standard."""
        return ["-O3", "-lineinfo", "--threads=2", *toolchain.gencode()]

    def extra_ldflags(self) -> list[str]:
        """The folder where the linker finds libcudart.so under exactly this name."""
        return [f"-L{self._runtime_folder()}"] if self.toolkit else []

    def load(self, verbose: bool = False) -> ModuleType:
        """The compiled module: prebuilt, or from the cache, or compiled now.

        Raises:
            Unavailable: no compiler, a failed compilation, a cache that cannot be written, or a
                prebuilt module for another PyTorch or CUDA.
        """
        with prebuilt.LOCK:
            module = prebuilt.load() or self.cached() or self._compile(verbose)
            operators.register()
            return module

    def cached(self) -> ModuleType | None:
        """A finished build of these sources; needs no compiler and no writable cache.

        Raises:
            Unavailable: others could have put it there, or it cannot be loaded.
        """
        if self.name in self._loaded:
            return self._loaded[self.name]
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
        self._loaded[self.name] = module
        return module

    def builder(self) -> Any:
        """The setuptools extension of an ahead-of-time build; build it within `environment`."""
        make = cpp_extension.CUDAExtension if self.toolkit else cpp_extension.CppExtension
        with self.environment():
            return make(
                name=prebuilt.MODULE,
                sources=[os.path.relpath(source) for source in self.sources()],
                include_dirs=self.include_paths(),
                extra_compile_args={"cxx": self.cxx_args(), "nvcc": self.nvcc_args()},
                extra_link_args=self.extra_ldflags(),
            )

    def jit_load(self, verbose: bool = True) -> ModuleType:
        """Compile in `folder` and load; build within `environment`."""
        return cpp_extension.load(
            name=self.name,
            sources=self.sources(),
            extra_include_paths=self.include_paths(),
            extra_cflags=self.cxx_args(),
            extra_cuda_cflags=self.nvcc_args(),
            extra_ldflags=self.extra_ldflags(),
            with_cuda=self.toolkit is not None,
            verbose=verbose,
        )

    def _compile(self, verbose: bool) -> ModuleType:
        toolchain.cxx(), toolchain.ninja()
        began = time.time()
        try:
            with folders.not_writable_by_all():
                self.folder.mkdir(parents=True, exist_ok=True)
                folders.check(self.folder, self._root)
                with folders.locked(self.folder), self.environment():
                    return self.cached() or self._compile_alone(verbose, began)
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
            module = self.jit_load(verbose)
        except Exception as error:
            reason = first_error(error, self.folder)
            with open_own(failed, "w") as file:
                file.write(reason)
            raise Unavailable(reason) from error
        folders.mark_complete(library)
        self._loaded[self.name] = module
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


def first_error(error: Exception, folder: Path) -> str:
    """The compiler's first error, in one line; its whole output is written to build.log."""
    log = folder / "build.log"
    with open_own(log, "w") as file:
        file.write(f"{error}\n")
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    telling = (" error: ", "cannot find ", "undefined reference")
    first = next((line for line in lines if any(sign in line for sign in telling)), lines[0])
    return f"the build failed, see {log}: {first}"
