"""Builds the simulator and steers it from Python."""

import ctypes
import fcntl
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent
# The interpreter's inner loops, and what runs once a module or launch: compiled side by side.
MACHINE = (
    "control",
    "order",
    "shared",
    "global",
    "memory",
    "async",
    "mbarrier",
    "registers",
    "compute",
    "arithmetic",
    "warp",
    "tensor",
    "counts",
)
FRONT = ("parse", "instructions", "driver", "runtime")
# Contraction would turn a multiplication and an addition of the kernel into one rounding.
GXX = ["g++", "-std=c++17", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]

TORCH_GXX = ["g++", "-std=c++20", "-O1", "-fPIC"]

ORDERS = {"first": 0, "last": 1, "random": 2}
# Bytes of shared memory that a block may have: with opt-in, by compute capability.
LIMITS = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "120": 99 << 10}
WITHOUT_OPT_IN = 48 << 10
MOST_THREADS = 1024


class LineCount(NamedTuple):
    """What a line of a kernel cost, over all launches."""

    warps: int  # instructions of warps
    lanes: int  # and of threads
    wavefronts: int  # of shared memory
    ideal: int  # the same without bank conflicts
    sectors: int  # of global memory, 32 bytes each
    bytes: int  # asked of global memory


def build(folder: Path) -> "Simulator":
    """The simulator's libraries in this folder, made by the first process that asks for them."""
    made_once(folder / "libptxsim_torch.so", _compile)
    return Simulator(folder)


def made_once(file: Path, make: Callable[[Path], None]) -> None:
    """Calls make(partial) and renames what it made, unless a process has done so before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            partial = file.with_suffix(".partial")
            make(partial)
            partial.rename(file)


def _compile(torch_memory: Path) -> None:
    folder = torch_memory.parent
    units = {"torch_memory": [*TORCH_GXX, str(SOURCES / "torch_memory.cpp")]}
    units["torch_memory"] += [
        o for path in cpp_extension.include_paths() for o in ("-isystem", path)
    ]
    for name, files, level in (("machine", MACHINE, "-O3"), ("front", FRONT, "-O1")):
        unit = folder / f"{name}.cpp"  # one translation unit: the headers are read once
        unit.write_text("".join(f'#include "{SOURCES / file}.cpp"\n' for file in files))
        units[name] = [*GXX, level, f"-I{SOURCES}", str(unit)]
    running = [
        subprocess.Popen([*command, "-c", "-o", str(folder / f"{name}.o")])
        for name, command in units.items()
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError("the simulator does not compile")
    objects = {name: str(folder / f"{name}.o") for name in units}
    library = str(folder / "libptxsim.so")
    link = ["g++", "-shared", "-Wl,-Bsymbolic", "-o"]  # whatever libcuda the process has loaded
    subprocess.run([*link, library, objects["machine"], objects["front"]], check=True)
    torch_library = Path(torch.__file__).parent / "lib"
    libraries = [library, f"-L{torch_library}", "-lc10", f"-Wl,-rpath,{folder}"]
    subprocess.run([*link, torch_memory, objects["torch_memory"], *libraries], check=True)


class Simulator:
    """`driver` has cuModuleLoadData and the like; kernels run on the tensors made in `watch()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = ctypes.CDLL(str(folder / "libptxsim.so"))
        self._torch = ctypes.CDLL(str(folder / "libptxsim_torch.so"))
        self.driver.ptxsim_findings.restype = ctypes.c_char_p
        self.driver.ptxsim_counts.restype = ctypes.c_char_p
        self._options = {"order": "first", "seed": 1, "truncate": 0, "check": 1, "strict": 1}
        self._limits = (WITHOUT_OPT_IN, LIMITS["90"], MOST_THREADS)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """CPU tensors made in here are global memory: exact bounds, and a pattern in fresh ones."""
        self._torch.ptxsim_watch_torch()
        try:
            yield
        finally:
            self._torch.ptxsim_unwatch_torch()

    @contextmanager
    def options(self, **changes: str | int | bool) -> Iterator[None]:
        """order: first, last or random (with seed) of warps and copies; truncate: sums of mma;
        check: races and uninitialised reads; strict: a finding is an error of the launch."""
        before = self._options
        unknown = changes.keys() - before.keys()
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}")
        self._set_options({**before, **changes})
        try:
            yield
        finally:
            self._set_options(before)

    def _set_options(self, options: dict[str, str | int | bool]) -> None:
        self._options = options
        self.driver.ptxsim_set_options(
            ORDERS[str(options["order"])],
            ctypes.c_ulong(int(options["seed"])),
            *(int(options[name]) for name in ("truncate", "check", "strict")),
        )

    @contextmanager
    def architecture(
        self, capability: str = "90", *, threads: int = MOST_THREADS
    ) -> Iterator[None]:
        """Launches have the limits of this compute capability."""
        before = self._limits
        self._limits = (WITHOUT_OPT_IN, LIMITS[capability], threads)
        self.driver.ptxsim_set_limits(*self._limits)
        try:
            yield
        finally:
            self._limits = before
            self.driver.ptxsim_set_limits(*before)

    def clear(self) -> None:
        """Forgets findings and counts."""
        self.driver.ptxsim_clear()

    def findings(self) -> list[str]:
        """One line each: kernel, how often, what, and where in the source."""
        lines = []
        for f in json.loads(self.driver.ptxsim_findings()):
            at = f" at {f['at']}" if f["at"] else ""
            other = f" and {f['other']}" if f["other"] else ""
            kind = f"{f['kernel']}: {f['count']} x {f['kind']}{at}{other}"
            lines.append(f"{kind} ({f['example']})")
        return lines

    def counts(self) -> dict[str, LineCount]:
        """By "file:line" of the innermost function, over all kernels."""
        lines: dict[str, LineCount] = {}
        for _, place, _, *numbers in json.loads(self.driver.ptxsim_counts()):
            line = place.split(" < ")[0]
            old = lines.get(line, (0,) * len(numbers))
            lines[line] = LineCount(*(a + b for a, b in zip(old, numbers, strict=True)))
        return lines

    def error(self) -> str:
        """What the last failing call says."""
        text = ctypes.c_char_p()
        self.driver.cuGetErrorString(1, ctypes.byref(text))
        return (text.value or b"").decode()
