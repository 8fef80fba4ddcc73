"""Operands of SASS: how they are read, written and tested."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irpe_ds.ops.bench.predict.sass.cubin import Instruction
from irpe_ds.ops.bench.predict.sass.lanes import PT, RZ, URZ, Flags, Lanes, Mask, Step, Words

Read = Callable[[Lanes], Words]
Test = Callable[[Lanes], Flags]
Write = Callable[[Lanes, Mask, NDArray[Any]], None]

REGISTER = re.compile(r"(U?)R(\d+|Z)")
PREDICATE = re.compile(r"(!?)(U?)P(\d|T)")
CONSTANT = re.compile(r"c\[(\w+)\]\[(?:(U?R(?:\d+|Z))\+?)?(-?0x[0-9a-f]+)?\]")


def register(text: str) -> tuple[bool, int]:
    """Whether it is a uniform one, and its number: `R12.reuse`, `UR4`, `RZ`."""
    found = REGISTER.match(text)
    if found is None:
        raise ValueError(f"no register: {text}")
    uniform, number = bool(found[1]), found[2]
    zero = URZ if uniform else RZ
    return uniform, zero if number == "Z" else int(number)


def is_predicate(text: str) -> bool:
    return PREDICATE.fullmatch(text) is not None


def test(text: str) -> Test:
    """A predicate: `P0`, `!UP1`, `PT`."""
    found = PREDICATE.fullmatch(text)
    if found is None:
        raise ValueError(f"no predicate: {text}")
    number = PT if found[3] == "T" else int(found[3])
    if found[2]:
        return (lambda s: ~s.up[number]) if found[1] else (lambda s: s.up[number])
    return (lambda s: ~s.p[number]) if found[1] else (lambda s: s.p[number])


def conjunction(tests: Sequence[Test]) -> Test | None:
    """All of them; None if there are none."""
    if len(tests) <= 1:
        return tests[0] if tests else None
    return lambda s: np.logical_and.reduce([each(s) for each in tests])


def read(text: str, as_float: bool = False) -> Read:
    """A source: register, constant or number, with its modifiers.

    Args:
        as_float: numbers and signs are those of float32.
    """
    text = text.replace(".reuse", "").replace(".H0_H0", "")
    found = re.fullmatch(r"([-~]?)(\|?)([^|]*)\|?", text)
    assert found is not None
    sign, absolute, inner = found.groups()
    byte = re.fullmatch(r"(U?R\d+)\.B(\d)", inner)
    if byte:
        return _byte(_plain(byte[1], as_float), 8 * int(byte[2]))
    if not re.match(r"[RUc]", inner):  # the sign belongs to the number
        word = np.array([immediate(text, as_float)], np.uint32)
        return lambda s: word
    return _modified(_plain(inner, as_float), sign, bool(absolute), as_float)


def immediate(text: str, as_float: bool) -> int:
    """The bits of a number."""
    special = {"+INF": 0x7F800000, "INF": 0x7F800000, "-INF": 0xFF800000}
    if text in special:
        return special[text]
    if "QNAN" in text:
        return 0x7FC00000
    if "0x" in text:
        return int(text, 16) & 0xFFFFFFFF
    if as_float or "." in text or "e" in text:
        return int(np.float32(text).view(np.uint32))
    return int(text) & 0xFFFFFFFF


def _plain(text: str, as_float: bool) -> Read:
    if not text.startswith("c["):
        uniform, number = register(text)
        return (lambda s: s.ur[number]) if uniform else (lambda s: s.r[number])
    found = CONSTANT.fullmatch(text)
    if found is None:
        raise ValueError(f"no constant: {text}")
    bank, offset = int(found[1], 16), int(found[3] or "0", 16)
    if found[2]:
        index = _plain(found[2], as_float)
        return lambda s: s.constants[bank][(index(s).astype(np.int64) + offset) // 4]
    place = slice(offset // 4, offset // 4 + 1)
    return lambda s: s.constants[bank][place]


def _byte(word: Read, shift: int) -> Read:
    amount, low = np.uint32(shift), np.uint32(0xFF)
    return lambda s: word(s) >> amount & low


def _modified(word: Read, sign: str, absolute: bool, as_float: bool) -> Read:
    """Its complement, absolute value or negative, or all of the latter."""
    if sign == "~":
        return lambda s: ~word(s)
    if as_float:
        size, top = np.uint32(0x7FFFFFFF), np.uint32(0x80000000 if sign else 0)
        if absolute:
            return lambda s: (word(s) & size) ^ top
        return (lambda s: word(s) ^ top) if sign else word
    whole = (lambda s: np.abs(word(s).view(np.int32)).view(np.uint32)) if absolute else word
    return (lambda s: -whole(s)) if sign else whole


def write(text: str, plus: int = 0) -> Write:
    """A destination, or the register so many after it."""
    uniform, number = register(text)
    if number == (URZ if uniform else RZ):
        return lambda s, mask, value: None
    number += plus
    if uniform:
        return lambda s, mask, value: np.copyto(
            s.ur[number], value, where=mask if mask is True else s.warp_any(mask)
        )
    return lambda s, mask, value: np.copyto(s.r[number], value, where=mask)


def write_test(text: str) -> Write:
    """A predicate as a destination."""
    found = PREDICATE.fullmatch(text)
    if found is None:
        raise ValueError(f"no predicate: {text}")
    if found[3] == "T":
        return lambda s, mask, value: None
    number = int(found[3])
    if found[2]:
        return lambda s, mask, value: np.copyto(
            s.up[number], value, where=mask if mask is True else s.warp_any(mask)
        )
    return lambda s, mask, value: np.copyto(s.p[number], value, where=mask)


def pair(text: str) -> Callable[[Lanes], NDArray[np.uint64]]:
    """64 bits: two registers, two words of a constant bank, or a number."""
    text = text.replace(".reuse", "").replace(".64", "")
    if text.startswith("c["):
        found = CONSTANT.fullmatch(text)
        assert found is not None
        next_word = f"c[{found[1]}][{int(found[3], 16) + 4:#x}]"
        low, high = _plain(text, False), _plain(next_word, False)
    elif REGISTER.match(text):
        uniform, number = register(text)
        zero = number == (URZ if uniform else RZ)
        kind = "UR" if uniform else "R"
        low = _plain(text, False)
        high = low if zero else _plain(f"{kind}{number + 1}", False)
    else:
        value = np.array([int(text, 16)], np.int64).view(np.uint64)
        return lambda s: value
    shift = np.uint64(32)
    return lambda s: high(s).astype(np.uint64) << shift | low(s)


def shared_address(text: str) -> Read:
    """`[R12.X4+UR4+0x10]`: in 32 bits."""
    parts = [_part(part) for part in _sum(text)]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        first, second = parts
        return lambda s: first(s) + second(s)

    def address(s: Lanes) -> Words:
        total = parts[0](s)
        for part in parts[1:]:
            total = total + part(s)
        return total

    return address


def global_address(text: str) -> Callable[[Lanes], NDArray[np.int64]]:
    """`desc[UR8][R2.64+0x10]`: in 64 bits."""
    wide = [pair(part) for part in _sum(text) if part.endswith(".64")]
    narrow = [_part(part) for part in _sum(text) if REGISTER.match(part) and ".64" not in part]
    fixed = sum(int(part, 16) for part in _sum(text) if not REGISTER.match(part))

    def address(s: Lanes) -> NDArray[np.int64]:
        total = np.full(1, fixed, np.int64)
        for each in wide:
            total = total + each(s).view(np.int64)
        for part in narrow:
            total = total + part(s)
        return total

    return address


def _sum(text: str) -> list[str]:
    inner = text[text.rindex("[") + 1 : text.rindex("]")]
    return [part for part in inner.split("+") if part] or ["0x0"]


def _part(text: str) -> Read:
    """A term of an address: a register, possibly scaled, or a number."""
    found = re.fullmatch(r"(U?R(?:\d+|Z))(?:\.X(\d+)|\.U32|\.64)?", text)
    if found is None:
        return read(text)
    word = _plain(found[1], False)
    if not found[2]:
        return word
    scale = np.uint32(int(found[2]))
    return lambda s: word(s) * scale


# ---- those of an instruction ----

FLOATS = {"FADD", "FMUL", "FFMA", "FSETP", "FMNMX", "FSEL", "MUFU", "F2FP", "F2I"}
"""Operations whose sources are float32."""


def sources(x: Instruction, first: int) -> list[Read]:
    """The operands from this one on, but predicates."""
    as_float = x.opcode[0] in FLOATS
    return [read(each, as_float) for each in x.operands[first:] if not is_predicate(each)]


def leading(x: Instruction, first: int) -> list[Write]:
    """The predicates from this operand on, which are results: carries."""
    found = []
    for each in x.operands[first:]:
        if not is_predicate(each):
            break
        found.append(write_test(each))
    return found


def trailing(x: Instruction, first: int) -> list[Test]:
    """The predicates after other sources, which are sources: carries, choices."""
    rest = list(x.operands[first:])
    while rest and is_predicate(rest[0]):
        del rest[0]
    return [test(each) for each in rest if is_predicate(each)]


def elementwise(function: Callable[..., Words]) -> Callable[[Instruction], Step]:
    """A result for each lane, from that lane's sources and then its predicates."""

    def make(x: Instruction) -> Step:
        result, given = write(x.operands[0]), [*sources(x, 1), *trailing(x, 1)]
        if len(given) == 1:
            (only,) = given
            return lambda s, mask: result(s, mask, function(only(s)))
        if len(given) == 2:
            a, b = given
            return lambda s, mask: result(s, mask, function(a(s), b(s)))
        return lambda s, mask: result(s, mask, function(*[each(s) for each in given]))

    return make
