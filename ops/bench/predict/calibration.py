"""Measured times of FlashAttention-2, to hold predictions against.

All are of sequences that add up to 16,384 tokens, with 2,048 numbers a token in all heads, without
a mask; a backward counts as 2.5 times the operations of a forward, 4 L^2 D for each head.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from irpe_ds.ops.bench.predict import flash
from irpe_ds.ops.bench.predict.gpus import GPUS
from irpe_ds.ops.bench.predict.prediction import Problem

TOKENS, WIDTH = 16384, 2048


class Measured(NamedTuple):
    """TFLOP/s that others have measured."""

    gpu: str
    head_dim: int
    tokens: int
    forward: float
    backward: float
    source: str


PAPER = "arXiv:2407.08608"
STABLE = "github.com/Dao-AILab/flash-attention/pull/2688"
ABI = "github.com/Dao-AILab/flash-attention/pull/1791"
RING = "github.com/gpu-mode/ring-attention/issues/10"
MEASURED = (
    Measured("H100", 64, 512, 282, 198, PAPER),
    Measured("H100", 64, 1024, 306, 238, PAPER),
    # These two name no GPU; what else they measure there shows that it is an H100, or its like.
    Measured("H100", 64, 512, 252, 190, STABLE),
    Measured("H100", 64, 1024, 295, 239, STABLE),
    Measured("H100", 64, 2048, 308, 264, STABLE),
    Measured("H100", 128, 8192, 370, 291, ABI),
    Measured("RTX A5000", 64, 512, 84, 53, RING),
    Measured("RTX A5000", 64, 1024, 81, 63, RING),
    Measured("RTX A5000", 64, 2048, 81, 70, RING),
)
"""No such measurements of an A100 or an L40S are known here."""


class Comparison(NamedTuple):
    """TFLOP/s."""

    measured: Measured
    forward: float
    backward: float


def compare(rows: Iterable[Measured] = MEASURED) -> Iterator[Comparison]:
    """Predictions beside measurements."""
    for row in rows:
        grid, heads = (row.tokens // 32, 32), WIDTH // row.head_dim
        problem = Problem("", grid, row.head_dim, TOKENS // row.tokens, heads, prefix_tokens=0)
        operations = 4 * row.tokens**2 * WIDTH * problem.batch
        times = [f(problem, GPUS[row.gpu]).microseconds for f in (flash.forward, flash.backward)]
        yield Comparison(row, operations / times[0] / 1e6, 2.5 * operations / times[1] / 1e6)
