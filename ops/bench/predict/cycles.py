"""Runs traces through the cycle model of one multiprocessor, multiprocessor.cpp."""

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from irpe_ds.ops.bench.predict.gpus import Hardware
from irpe_ds.ops.bench.predict.sass.cubin import Instruction, Program
from irpe_ds.ops.bench.predict.sass.emulator import RECORD, Traces
from irpe_ds.ops.bench.predict.sass.memory import tests_barrier
from irpe_ds.ops.build import nvrtc, toolchain

SOURCES = sorted(Path(__file__).parent.glob("multiprocessor.*"))
"""Of the model: a .cpp file and its .h file."""
UNITS = (
    *("none", "alu", "fma", "imad", "mufu", "hmma", "shared", "load", "store", "copy", "local"),
    *("constant", "uniform", "barrier", "branch", "commit", "copies", "special", "reduce"),
    *("mbarrier", "arrive", "arrive after copies"),
)
"""What executes an instruction, in the order of multiprocessor.cpp."""
REASONS = (
    *UNITS,
    *("other warps", "block barrier", "stall", "hmma pipe", "mufu pipe", "memory pipe"),
    "other pipe",
)
"""What warps wait for: the result of a unit, or these."""

OPERATIONS = {
    "hmma": "HMMA",
    "shared": "LDS STS LDSM SHFL",
    "load": "LDG",
    "store": "STG",
    "reduce": "RED REDG",
    "copy": "LDGSTS",
    "local": "LDL STL",
    "constant": "LDC",
    "mufu": "MUFU F2I I2F",
    "fma": "FADD FMUL FFMA HFMA2",
    "imad": "IMAD",
    "barrier": "BAR",
    "arrive": "ATOMS",
    "arrive after copies": "ARRIVES",
    "branch": "BRA CALL RET",
    "commit": "LDGDEPBAR",
    "copies": "DEPBAR",
    "special": "S2R S2UR R2UR",
    "none": "NOP BSSY BSYNC WARPSYNC BREAK EXIT",
}
UNIT_OF = {name: unit for unit, names in OPERATIONS.items() for name in names.split()}
"""Else `uniform` where the name begins with a U, and `alu`."""


class Trace(ctypes.Structure):
    """Of a warp."""

    _fields_ = (("records", ctypes.c_void_p), ("count", ctypes.c_int64))


class Result(ctypes.Structure):
    """In cycles."""

    _fields_ = (
        *(("cycles", ctypes.c_double), ("issued", ctypes.c_double)),
        ("busy", ctypes.c_double * len(UNITS)),
        ("waits", ctypes.c_double * len(REASONS)),
    )


class Run(NamedTuple):
    """Blocks on a multiprocessor, from the first to the last."""

    cycles: float
    issued: float
    """Instructions."""
    busy: np.ndarray
    """Cycles of each of UNITS, of all partitions together."""
    waits: np.ndarray
    """Cycles that warps spend on each of REASONS."""

    def since(self, earlier: "Run") -> "Run":
        return Run(
            self.cycles - earlier.cycles,
            self.issued - earlier.issued,
            self.busy - earlier.busy,
            self.waits - earlier.waits,
        )


def simulate(
    program: Program, traces: Traces, hardware: Hardware, *, warps: int, repeat: int, resident: int
) -> Run:
    """Run blocks of so many warps each, all of them `repeat` times, so many of them at a time.

    Raises:
        Unavailable: there is no C++ compiler.
        RuntimeError: a barrier is never completed.
    """
    instructions = np.array([_scheduled(x) for x in program.instructions], np.int32)
    each = [Trace(x.ctypes.data, len(x)) for x in traces.warps] * repeat
    barriers = np.array(list(traces.barriers.items()), np.int64)
    assert all(x.dtype == RECORD and x.flags.c_contiguous for x in traces.warps)
    result = Result()
    ends = _library().simulate(
        ctypes.byref(hardware),
        ctypes.c_void_p(instructions.ctypes.data),
        (Trace * len(each))(*each),
        *(len(each) // warps, warps, resident),
        ctypes.c_void_p(barriers.ctypes.data),
        len(barriers),
        ctypes.byref(result),
    )
    if not ends:
        raise RuntimeError(f"the warps of {program.name} wait for each other without end")
    return Run(result.cycles, result.issued, np.array(result.busy), np.array(result.waits))


def unit_of(x: Instruction) -> str:
    """What executes it."""
    name = x.opcode[0]
    if name == "SYNCS":
        waits, starts = "PHASECHK" in x.opcode, "EXCH" in x.opcode
        return "mbarrier" if waits else "none" if starts else "arrive"
    if tests_barrier(x):
        return "mbarrier"
    return UNIT_OF.get(name, "uniform" if name.startswith("U") else "alu")


def _scheduled(x: Instruction) -> tuple[int, ...]:
    """Instruction of multiprocessor.cpp."""
    unit, detail = unit_of(x), 0
    if unit == "hmma":
        detail = int("1688" in x.opcode)
    elif unit == "copies" and len(x.operands) > 1:
        detail = int(x.operands[1], 16)
    barriers = (x.write_barrier, x.read_barrier, x.wait_mask)
    return UNITS.index(unit), x.stall, *barriers, detail


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiled once, and kept beside the kernels."""
    command = [*toolchain.cxx().split(), "-std=c++20", "-O2", "-shared", "-fPIC"]
    parts = [" ".join(command).encode(), *(path.read_bytes() for path in SOURCES)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    kept = nvrtc.cache_folder() / f"multiprocessor-{digest}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        own = kept.with_name(f"{kept.name}.{os.getpid()}")
        subprocess.run([*command, str(SOURCES[0]), "-o", str(own)], check=True)
        os.replace(own, kept)
    return ctypes.CDLL(str(kept))
