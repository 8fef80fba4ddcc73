"""Integer arithmetic of SASS: exact, since addresses depend on it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irpe_ds.ops.bench.predict.sass.cubin import Instruction
from irpe_ds.ops.bench.predict.sass.lanes import Flags, Lanes, Mask, Step, Words
from irpe_ds.ops.bench.predict.sass.operands import (
    FLOATS,
    elementwise,
    is_predicate,
    leading,
    pair,
    read,
    sources,
    trailing,
    write,
)

U32, I32, U64, I64, F32 = np.uint32, np.int32, np.uint64, np.int64, np.float32
HIGH = np.uint64(32)


def _add(x: Instruction) -> Step:
    """IADD3: with up to two carries out, and one or two in."""
    result, (first, *rest) = write(x.operands[0]), sources(x, 1)
    carries_out, carries_in = leading(x, 1), trailing(x, 1)

    def narrow(s: Lanes, mask: Mask) -> None:
        total = first(s)
        for source in rest:
            total = total + source(s)
        for carry in carries_in:
            total = total + carry(s).astype(U32)
        result(s, mask, total)

    texts = [each for each in x.operands[1:] if not is_predicate(each)]
    negative = [re.match(r"-[RUc]", text) is not None for text in texts]
    plain = [read(each[1:] if minus else each) for each, minus in zip(texts, negative, strict=True)]

    def wide(s: Lanes, mask: Mask) -> None:
        total = np.zeros(1, U64)
        for source, minus in zip(plain, negative, strict=True):
            value = source(s)
            # -x is ~x + 1 with the carry of that sum
            total = total + ((~value).astype(U64) + U64(1) if minus else value.astype(U64))
        for carry in carries_in:
            total = total + carry(s).astype(U64)
        result(s, mask, total.astype(U32))
        for count, carry_out in enumerate(carries_out, 1):
            carry_out(s, mask, total >> HIGH >= U64(count))

    return wide if carries_out else narrow


def _multiply_add(x: Instruction) -> Step:
    kinds = x.opcode[1:]
    if "WIDE" in kinds or "HI" in kinds:
        return _multiply_add_wide(x)
    result, (a, b, c) = write(x.operands[0]), sources(x, 1)
    carries = trailing(x, 1)

    def step(s: Lanes, mask: Mask) -> None:
        total = a(s) * b(s) + c(s)
        for carry in carries:
            total = total + carry(s).astype(U32)
        result(s, mask, total)

    if x.operands[1:3] == ("RZ", "RZ"):
        return lambda s, mask: result(s, mask, c(s))
    return step


def _multiply_add_wide(x: Instruction) -> Step:
    """64 bits of a product and a sum, or the upper 32 of them."""
    is_unsigned, is_high = "U32" in x.opcode, "HI" in x.opcode
    low, high = write(x.operands[0]), write(x.operands[0], 0 if is_high else 1)
    carries = leading(x, 1)
    first, second, third = [each for each in x.operands[1:] if not is_predicate(each)]
    a, b, c = read(first), read(second), pair(third)

    def step(s: Lanes, mask: Mask) -> None:
        if is_unsigned:
            product = a(s).astype(U64) * b(s).astype(U64)
        else:
            product = (a(s).view(I32).astype(I64) * b(s).view(I32).astype(I64)).view(U64)
        total = product + c(s)
        if not is_high:
            low(s, mask, total.astype(U32))
        high(s, mask, (total >> HIGH).astype(U32))
        for carry in carries:
            carry(s, mask, total < product)

    return step


def _shift_add(x: Instruction) -> Step:
    """LEA: b + (a << n), or with HI b + the upper half of (c:a << n)."""
    result, carries_out, carries_in = write(x.operands[0]), leading(x, 1), trailing(x, 1)
    texts = [each for each in x.operands[1:] if not is_predicate(each)]
    a, b, shift = read(texts[0]), read(texts[1]), int(texts[-1], 16)
    is_high, is_extended = "HI" in x.opcode, "SX32" in x.opcode
    above = read(texts[2]) if is_high and not is_extended else None

    def step(s: Lanes, mask: Mask) -> None:
        value = a(s).astype(U64)
        if is_extended:
            value = a(s).view(I32).astype(I64).view(U64)
        elif above is not None:
            value = above(s).astype(U64) << HIGH | value
        shifted = value << U64(shift)
        if is_high:
            shifted = shifted >> HIGH
        total = (shifted & U64(0xFFFFFFFF)) + b(s)
        for carry in carries_in:
            total = total + carry(s).astype(U64)
        result(s, mask, total.astype(U32))
        for carry_out in carries_out:
            carry_out(s, mask, total >> HIGH != 0)

    return step


def table_of_three(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any], table: int) -> NDArray[Any]:
    """The function of three bits, bitwise: entry 4 a + 2 b + c of the table."""
    result = (a ^ a) & b & c
    for entry in range(8):
        if table >> entry & 1:
            result = result | (
                (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
            )
    return result


LOGIC: Mapping[int, Callable[[Words, Words, Words], Words]] = {
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
}
"""Tables that are frequent."""


def _logic(x: Instruction) -> Step:
    predicates = leading(x, 0)
    texts = x.operands[len(predicates) :]
    result, (a, b, c) = write(texts[0]), map(read, texts[1:4])
    table = int(texts[4], 16)
    function = LOGIC.get(table, lambda a, b, c: table_of_three(a, b, c, table))

    def step(s: Lanes, mask: Mask) -> None:
        value = function(a(s), b(s), c(s))
        result(s, mask, value)
        for predicate in predicates:
            predicate(s, mask, value != 0)

    return step


def _shift(x: Instruction) -> Step:
    """SHF: of the two words (c:a), the upper or the lower one of the result."""
    result, (a, amount, c) = write(x.operands[0]), sources(x, 1)
    is_left, is_high = x.opcode[1] == "L", "HI" in x.opcode
    is_signed, is_wide = "S32" in x.opcode or "S64" in x.opcode, x.opcode[2] in ("U64", "S64")

    def narrow(s: Lanes, mask: Mask) -> None:
        count = amount(s)
        if is_left:
            value = np.where(count < 32, a(s) << (count & U32(31)), U32(0))
        else:
            word = c(s) if is_high else a(s)
            if is_signed:
                value = (word.view(I32) >> np.minimum(count, U32(31)).view(I32)).view(U32)
            else:
                value = np.where(count < 32, word >> (count & U32(31)), U32(0))
        result(s, mask, value)

    def wide(s: Lanes, mask: Mask) -> None:
        words = c(s).astype(U64) << HIGH | a(s)
        count = np.minimum(amount(s), U32(63)).astype(U64)
        if is_left:
            words = words << count
        elif is_signed:
            words = (words.view(I64) >> count.view(I64)).view(U64)
        else:
            words = words >> count
        result(s, mask, (words >> HIGH if is_high else words).astype(U32))

    return wide if is_wide else narrow


def _smaller_or_larger(x: Instruction) -> Step:
    """MNMX of each kind: the smaller one where the predicate holds."""
    kind = F32 if x.opcode[0] in FLOATS else U32 if "U32" in x.opcode else I32
    smaller, larger = (np.fmin, np.fmax) if kind is F32 else (np.minimum, np.maximum)
    added = x.opcode[0] == "VIADDMNMX"

    def function(*sources: Any) -> Words:
        *words, choice = sources
        a = words[0] + words[1] if added else words[0]
        a, b = a.view(kind), words[-1].view(kind)
        return np.where(choice, smaller(a, b), larger(a, b)).view(U32)

    return elementwise(function)(x)


def _select(a: Words, b: Words, first: Flags) -> Words:
    return np.where(first, a, b)


def _permute(x: Instruction) -> Step:
    """PRMT: four bytes of (b:a); a selector above 7 repeats the byte's sign."""

    def function(a: Words, selector: Words, b: Words) -> Words:
        both, value = b.astype(U64) << HIGH | a, np.zeros(1, U32)
        for n in range(4):
            chosen = selector >> U32(4 * n) & U32(15)
            byte = (both >> ((chosen & U32(7)).astype(U64) * U64(8)) & U64(0xFF)).astype(U32)
            sign = np.where(byte & U32(0x80), U32(0xFF), U32(0))
            value = value | np.where(chosen & U32(8), sign, byte) << U32(8 * n)
        return value

    return elementwise(function)(x)


INTEGERS: Mapping[str, Callable[[Instruction], Step]] = {
    **dict.fromkeys(("MOV", "UMOV"), elementwise(lambda a: a)),
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD", "IADD", "UIADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), _shift_add),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX", "FMNMX", "VIADDMNMX"), _smaller_or_larger),
    **dict.fromkeys(("SEL", "USEL", "FSEL"), elementwise(_select)),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    "IABS": elementwise(lambda a: np.abs(a.view(I32)).view(U32)),
}
"""What executes an operation, by the first part of its name."""
