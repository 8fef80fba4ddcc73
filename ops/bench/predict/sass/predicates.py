"""Predicates of SASS, and what passes between the lanes of a warp."""

from collections.abc import Callable, Mapping

import numpy as np

from irpe_ds.ops.bench.predict.sass.cubin import Instruction
from irpe_ds.ops.bench.predict.sass.integers import table_of_three
from irpe_ds.ops.bench.predict.sass.lanes import WARP, Flags, Lanes, Mask, Step, Words
from irpe_ds.ops.bench.predict.sass.operands import (
    FLOATS,
    is_predicate,
    leading,
    read,
    register,
    sources,
    test,
    write,
    write_test,
)

U32, I32, I64, F32 = np.uint32, np.int32, np.int64, np.float32

COMPARE: Mapping[str, Callable[..., Flags]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
COMBINE: Mapping[str, Callable[..., Flags]] = {
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}


def _compare(x: Instruction) -> Step:
    """SETP: a comparison and its opposite, each combined with a predicate."""
    first, second = write_test(x.operands[0]), write_test(x.operands[1])
    (a, b), predicates = sources(x, 2), [test(each) for each in x.operands[4:]]
    combine = next(COMBINE[each] for each in x.opcode if each in COMBINE)
    compare = _comparison(x)
    lower = predicates[1] if "EX" in x.opcode else None  # of the lower halves of 64 bits

    def step(s: Lanes, mask: Mask) -> None:
        left, right = a(s), b(s)
        holds = compare(left, right)
        if lower is not None:
            equal = left == right
            holds = (holds & ~equal) | (equal & lower(s))
        with_ = predicates[0](s)
        value, opposite = combine(holds, with_), combine(~holds, with_)
        first(s, mask, value)
        second(s, mask, opposite)

    return step


def _comparison(x: Instruction) -> Callable[[Words, Words], Flags]:
    name = x.opcode[1]
    compare = COMPARE[name[:2]]
    if x.opcode[0] not in FLOATS:
        kind = U32 if "U32" in x.opcode else I32
        return lambda a, b: compare(a.view(kind), b.view(kind))

    def floats(a: Words, b: Words) -> Flags:
        left, right = a.view(F32), b.view(F32)
        unordered, holds = np.isnan(left) | np.isnan(right), compare(left, right)
        return holds | unordered if name.endswith("U") else holds & ~unordered

    return floats


def _predicate_logic(x: Instruction) -> Step:
    first, second = write_test(x.operands[0]), write_test(x.operands[1])
    a, b, c = (test(each) for each in x.operands[2:5])
    tables = int(x.operands[5], 16), int(x.operands[6], 16)

    def step(s: Lanes, mask: Mask) -> None:
        values = [table_of_three(a(s), b(s), c(s), table) for table in tables]
        first(s, mask, values[0])
        second(s, mask, values[1])

    return step


def _predicates_to_register(x: Instruction) -> Step:
    result, rest, chosen = write(x.operands[0]), read(x.operands[2]), int(x.operands[3], 16)

    def step(s: Lanes, mask: Mask) -> None:
        value = rest(s) & U32(~chosen & 0xFFFFFFFF)
        for n in range(7):
            if chosen >> n & 1:
                value = value | s.p[n].astype(U32) << U32(n)
        result(s, mask, value)

    return step


def _register_to_predicates(x: Instruction) -> Step:
    word, chosen = read(x.operands[1]), int(x.operands[2], 16)
    results = [(n, write_test(f"P{n}")) for n in range(7) if chosen >> n & 1]

    def step(s: Lanes, mask: Mask) -> None:
        value = word(s)
        for n, result in results:
            result(s, mask, (value >> U32(n) & U32(1)).astype(np.bool_))

    return step


# ---- lanes of a warp ----


def _vote(x: Instruction) -> Step:
    to_predicate, holds = is_predicate(x.operands[0]), test(x.operands[-1])
    result = write_test(x.operands[0]) if to_predicate else write(x.operands[0])
    bits = U32(1) << np.arange(WARP, dtype=U32)

    def step(s: Lanes, mask: Mask) -> None:
        active = np.asarray(mask)
        if not to_predicate:
            votes = np.where(s.by_warp(holds(s) & active), bits, U32(0)).sum(1, dtype=U32)
            result(s, mask, np.repeat(votes, WARP))
        elif "ALL" in x.opcode:
            result(s, mask, ~s.warp_any(~holds(s) & active))
        else:
            result(s, mask, s.warp_any(holds(s) & active))

    return step


def _shuffle(x: Instruction) -> Step:
    result, value, amount = write(x.operands[1]), read(x.operands[2]), read(x.operands[3])
    kind = x.opcode[1]

    def step(s: Lanes, mask: Mask) -> None:
        by, lane = amount(s).astype(I64) & (WARP - 1), s.number % WARP
        if kind == "BFLY":
            other = lane ^ by
        elif kind == "IDX":
            other = by
        else:
            other = np.clip(lane + by if kind == "DOWN" else lane - by, 0, WARP - 1)
        result(s, mask, np.broadcast_to(value(s), s.count)[s.number - lane + other])

    return step


def _to_uniform(x: Instruction) -> Step:
    """R2UR: of the first lane; the predicate tells which lanes have another value, for a loop over
    the values that there are."""
    others = leading(x, 0)
    to, source = x.operands[len(others) : len(others) + 2]
    result, value = write(to), read(source)
    names = register(to), register(source)

    def step(s: Lanes, mask: Mask) -> None:
        if names[1] in s.loaded_from:
            s.loaded_from[names[0]] = s.loaded_from[names[1]]
        words = value(s)
        first = s.first(words, mask)
        result(s, mask, first)
        for predicate in others:
            predicate(s, mask, words != first)

    return step


def _special_register(x: Instruction) -> Step:
    name, result = x.operands[1], write(x.operands[0])
    rest = write(x.operands[0], 1) if x.opcode[0] == "CS2R" and "32" not in x.opcode else None
    zero, lanes = np.zeros(1, U32), np.arange(WARP, dtype=U32)
    values: Mapping[str, Callable[[Lanes], Words]] = {
        "SR_TID.X": lambda s: s.threads,
        "SR_CTAID.X": lambda s: s.blocks[0],
        "SR_CTAID.Y": lambda s: s.blocks[1],
        "SR_CTAID.Z": lambda s: s.blocks[2],
        "SR_LANEID": lambda s: np.tile(lanes, s.count // WARP),
        **dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId", "SRZ"), lambda s: zero),
    }
    value = values[name]

    def step(s: Lanes, mask: Mask) -> None:
        result(s, mask, value(s))
        if rest is not None:
            rest(s, mask, zero)

    return step


def _false(x: Instruction) -> Step:
    """FCHK: no division needs its slow path."""
    result = write_test(x.operands[0])
    return lambda s, mask: result(s, mask, np.zeros(1, np.bool_))


PREDICATES: Mapping[str, Callable[[Instruction], Step]] = {
    **dict.fromkeys(("ISETP", "UISETP", "FSETP"), _compare),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    "P2R": _predicates_to_register,
    "R2P": _register_to_predicates,
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    "SHFL": _shuffle,
    "R2UR": _to_uniform,
    **dict.fromkeys(("S2R", "S2UR", "CS2R", "CS2UR"), _special_register),
    "FCHK": _false,
}
"""What executes an operation, by the first part of its name."""
