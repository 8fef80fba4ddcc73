"""Floating-point arithmetic of SASS, as numpy does it; sums of matrix products stay as they are."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irpe_ds.ops.bench.predict.sass.cubin import Instruction
from irpe_ds.ops.bench.predict.sass.lanes import RZ, Lanes, Mask, Step, Words
from irpe_ds.ops.bench.predict.sass.operands import (
    elementwise,
    register,
    write,
)

U32, I32, I64, F32 = np.uint32, np.int32, np.int64, np.float32


def _float(x: Words) -> NDArray[np.float32]:
    return x.view(F32)


def _bits(x: NDArray[Any]) -> Words:
    return x.astype(F32, copy=False).view(U32)


FUNCTIONS: Mapping[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": lambda x: F32(1) / x,
    "RSQ": lambda x: F32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
}


def _special_function(x: Instruction) -> Step:
    function = FUNCTIONS[x.opcode[1]]
    return elementwise(lambda a: _bits(function(_float(a))))(x)


def _from_integer(x: Instruction) -> Step:
    kind = U32 if "U32" in x.opcode or "RP" in x.opcode else I32
    return elementwise(lambda a: _bits(a.view(kind)))(x)


def _pack(high: Words, low: Words) -> Words:
    """F2FP: two numbers rounded to bfloat16."""

    def rounded(a: Words) -> Words:
        return a + U32(0x7FFF) + (a >> U32(16) & U32(1)) >> U32(16)

    return rounded(high) << U32(16) | rounded(low)


def _halves(x: Instruction) -> Step:
    """HFMA2 is how constants of two halves get into a register; its products are not needed."""
    result, value = write(x.operands[0]), np.zeros(1, U32)
    if set(x.operands[1:3]) <= {"RZ", "-RZ"}:
        value = np.array(x.operands[4:2:-1], np.float16).view(U32)
    return lambda s, mask: result(s, mask, value)


def _matrix_product(x: Instruction) -> Step:
    """HMMA: the result is the sum that it is added to."""
    (_, to), (_, sums) = register(x.operands[0]), register(x.operands[3])
    writes = [write(x.operands[0], n) for n in range(4)] if to != sums else []
    step = 0 if sums == RZ else 1

    def copy(s: Lanes, mask: Mask) -> None:
        values = [s.r[sums + n * step].copy() for n in range(len(writes))]
        for result, value in zip(writes, values, strict=True):
            result(s, mask, value)

    return copy


ARITHMETIC: Mapping[str, Callable[[Instruction], Step]] = {
    "FADD": elementwise(lambda a, b: _bits(_float(a) + _float(b))),
    "FMUL": elementwise(lambda a, b: _bits(_float(a) * _float(b))),
    "FFMA": elementwise(lambda a, b, c: _bits(_float(a) * _float(b) + _float(c))),
    "MUFU": _special_function,
    "F2FP": elementwise(_pack),
    "F2I": elementwise(lambda a: np.trunc(_float(a)).astype(I64).astype(U32)),
    **dict.fromkeys(("I2F", "I2FP"), _from_integer),
    **dict.fromkeys(("HFMA2", "HADD2", "HMUL2"), _halves),
    "HMMA": _matrix_product,
}
"""What executes an operation, by the first part of its name."""
