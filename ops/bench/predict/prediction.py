"""What is predicted of a kernel."""

from typing import NamedTuple

import numpy as np

from irpe_ds.ops.bench.predict.cycles import REASONS, UNITS, Run
from irpe_ds.ops.bench.predict.sass.cubin import Instruction, Program
from irpe_ds.ops.bench.predict.sass.emulator import EXECUTED, Traces


class Problem(NamedTuple):
    """Attention in bfloat16 of B images, H heads and L tokens: a class token, a grid of patches."""

    on: str
    """Where relative position is: some of q, k, v; contextual, product maps."""
    grid: tuple[int, int] = (14, 14)
    head_dim: int = 64
    batch: int = 256
    heads: int = 6
    prefix_tokens: int = 1

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.prefix_tokens

    @property
    def matrix_bytes(self) -> int:
        """Of q, k, v, the output or a gradient."""
        return self.batch * self.heads * self.tokens * self.head_dim * 2


class Counts(NamedTuple):
    """Of what warps have executed."""

    instructions: float
    hmma: float
    """Matrix instructions, m16n8k16; one of k = 8 is half of one."""
    wavefronts: float
    """Of shared memory: loads, stores and ldmatrix."""

    @classmethod
    def of(cls, program: Program, traces: Traces) -> "Counts":
        products = np.array([_products(x) for x in program.instructions])
        shared = np.array([x.opcode[0] in ("LDS", "STS", "LDSM") for x in program.instructions])
        totals = np.zeros(3)
        for trace in traces.warps:
            executed = trace[trace["state"] == EXECUTED]
            index = executed["index"]
            wavefronts = executed["x"][shared[index]].sum()
            totals += len(trace), products[index].sum(), wavefronts
        return cls(*map(float, totals))

    def since(self, earlier: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(self, earlier, strict=True)))

    def over(self, heads: float) -> "Counts":
        """Of one of so many heads."""
        return Counts(*(each / heads for each in self))


def _products(x: Instruction) -> float:
    return 0.0 if x.opcode[0] != "HMMA" else 0.5 if "1688" in x.opcode else 1.0


class Prediction(NamedTuple):
    """Of a kernel on a GPU."""

    microseconds: float
    of_a_head: Counts
    cycles: float
    """That a multiprocessor takes for a head in the steady state."""
    waits: dict[str, float]
    """What its warps wait for, shares of their time, the largest first."""
    busy: dict[str, float]
    """How busy pipes are, shares of all cycles."""


PIPES = {"hmma": 4, "shared": 1, "mufu": 4, "alu": 4, "fma": 4, "load": 1}
"""Units whose use is shown, and how many of them a multiprocessor has; `load` is its way to L2."""


def prediction(microseconds: float, of_a_head: Counts, steady: Run, heads: float) -> Prediction:
    """From what happens in the steady state, while so many heads pass."""
    shares = steady.waits / steady.waits.sum()
    waits = {REASONS[n]: float(shares[n]) for n in np.argsort(-shares) if shares[n] > 0}
    busy = {
        name: float(steady.busy[UNITS.index(name)] / count / steady.cycles)
        for name, count in PIPES.items()
    }
    return Prediction(microseconds, of_a_head, steady.cycles / heads, waits, busy)
