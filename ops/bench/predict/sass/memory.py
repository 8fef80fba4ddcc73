"""Loads, stores, copies and mbarriers of SASS: which addresses they have, and what that costs."""

import functools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from irpe_ds.ops.bench.predict.sass.cubin import Instruction
from irpe_ds.ops.bench.predict.sass.floats import ARITHMETIC
from irpe_ds.ops.bench.predict.sass.integers import INTEGERS
from irpe_ds.ops.bench.predict.sass.lanes import RZ, WARP, Event, Flags, Lanes, Mask, Step, Words
from irpe_ds.ops.bench.predict.sass.operands import (
    CONSTANT,
    Write,
    global_address,
    read,
    register,
    shared_address,
    write,
    write_test,
)
from irpe_ds.ops.bench.predict.sass.predicates import PREDICATES

BANKS, WORD = 32, 4
"""Of shared memory: 32 banks of 4 bytes, each of which serves one word a wavefront."""
LINE = 128
"""Bytes of a cache line."""
NEVER = np.int64(2**62)


def width(x: Instruction) -> int:
    """Bytes that a lane loads or stores."""
    if x.opcode[0] == "LDSM":
        return 16
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[each] for each in x.opcode if each in sizes), WORD)


# ---- what an access costs ----


def wavefronts(addresses: Words, mask: Flags, width: int) -> NDArray[np.int64]:
    """How often shared memory is read or written for each warp's access.

    Quarters of a warp are served one after the other where lanes have 16 bytes, halves where they
    have 8. Lanes that read the same word share it; each wavefront serves one word of each bank.

    Args:
        addresses: (warps, 32).
        mask: (warps, 32): lanes that take part.
        width: bytes of a lane.

    Returns:
        (warps,)
    """
    of_lane = np.arange(max(1, width // WORD), dtype=np.uint32)
    words = addresses[..., None] // np.uint32(WORD) + of_lane
    word = np.where(mask[..., None], words.astype(np.int64), NEVER).reshape(-1, BANKS)
    word.sort(1)
    is_new = np.diff(word, axis=1, prepend=-1) != 0
    group, place = np.nonzero(is_new & (word != NEVER))
    bank = word[group, place] % BANKS
    counts = np.bincount(group * BANKS + bank, minlength=len(word) * BANKS)
    most: NDArray[np.int64] = counts.reshape(len(mask), -1, BANKS).max(2).sum(1)
    return most


@functools.lru_cache(maxsize=100_000)
def _wavefronts(addresses: bytes, mask: bytes, width: int) -> NDArray[np.int64]:
    """Loops have the same conflicts again and again."""
    lanes = np.frombuffer(addresses, np.uint32).reshape(-1, WARP)
    return wavefronts(lanes, np.frombuffer(mask, np.bool_).reshape(-1, WARP), width)


def _shared_event(s: Lanes, addresses: Words, mask: Mask, width: int) -> Event:
    """(wavefronts, 0, 0): conflicts stay when addresses move by whole rows of banks."""
    row = np.uint32(BANKS * WORD)
    relative = np.broadcast_to(addresses - addresses[0] // row * row, s.count)
    lanes = np.broadcast_to(np.asarray(mask), s.count)
    event = np.zeros((3, s.count // WARP), np.int64)
    event[0] = _wavefronts(relative.tobytes(), lanes.tobytes(), width)
    return event


def _global_event(s: Lanes, addresses: NDArray[np.int64], mask: Mask, width: int) -> Event:
    """(first line, lines, bytes) of each warp."""
    lanes = s.by_warp(np.asarray(mask))
    lines = np.sort(np.where(lanes, s.by_warp(addresses) // LINE, NEVER), 1)
    is_new = np.diff(lines, axis=1, prepend=-1) != 0
    count = (is_new & (lines != NEVER)).sum(1)
    return np.stack([lines[:, 0], count, lanes.sum(1) * width])


def _barrier_event(s: Lanes, addresses: Words, mask: Mask, parity: Words | None = None) -> Event:
    """(address, parity to wait for, lanes that arrive) of each warp."""
    address = s.first(addresses, mask)[::WARP].astype(np.int64)
    lanes = s.by_warp(np.asarray(mask)).sum(1)
    wanted = np.zeros_like(address) if parity is None else s.first(parity, mask)[::WARP] >> 31
    return np.stack([address, wanted, lanes]).astype(np.int64)


# ---- shared memory ----


def _load_shared(x: Instruction) -> Step:
    """What is loaded is zero."""
    to = register(x.operands[0])
    if to == (False, RZ):  # how compilers fill in for time
        return lambda s, mask: np.zeros((3, s.count // WARP), np.int64)
    address, size = shared_address(x.operands[1]), width(x)
    registers, rows = max(1, size // WORD), WARP
    if x.opcode[0] == "LDSM":  # a matrix has 8 rows, at the addresses of as many lanes
        registers = int(x.opcode[-1]) if x.opcode[-1].isdigit() else 1
        rows = 8 * registers
    results, zero = _results(x.operands[0], registers), np.zeros(1, np.uint32)

    def step(s: Lanes, mask: Mask) -> Event:
        addresses = address(s)
        if size == WORD:
            s.loaded_from[to] = addresses.copy()
        used = mask if rows == WARP else mask & (s.number % WARP < rows)
        event = _shared_event(s, addresses, used, size)
        for result in results:  # one of which may be the register of the address
            result(s, mask, zero)
        return event

    return step


def _store_shared(x: Instruction) -> Step:
    address, size = shared_address(x.operands[0]), width(x)
    value = read(x.operands[1]) if size == 8 else None

    def step(s: Lanes, mask: Mask) -> Event:
        addresses = address(s)
        if value is not None:
            count = 0x40000000 - s.one(value(s), mask)
            if 0 < count <= 1024:  # on sm_80 and sm_89 an mbarrier is initialised by a store
                s.barriers[s.one(addresses, mask)] = count
        return _shared_event(s, addresses, mask, size)

    return step


def _results(text: str, count: int) -> list[Write]:
    return [write(text, n) for n in range(count)]


# ---- device memory ----


def _bracketed(x: Instruction, last: bool = False) -> str:
    places = [each for each in x.operands if "[" in each]
    return places[-1 if last else 0]


def _load_global(x: Instruction) -> Step:
    address, size = global_address(_bracketed(x)), width(x)
    results = _results(x.operands[0], max(1, size // WORD))
    kept = np.uint32(2 ** (8 * min(size, WORD)) - 1)

    def step(s: Lanes, mask: Mask) -> Event:
        addresses = address(s)
        for n, result in enumerate(results):
            result(s, mask, _load(s, addresses + WORD * n) & kept)
        return _global_event(s, addresses, mask, size)

    return step


def _load(s: Lanes, addresses: NDArray[np.int64]) -> Words:
    """The words of device memory at these addresses."""
    found = np.zeros(1, np.uint32)
    for begin, data in s.memory.items():
        offsets = addresses - begin
        inside = (offsets >= 0) & (offsets + WORD <= len(data))
        if inside.any():
            places = np.where(inside, offsets, 0)[:, None] + np.arange(WORD)
            words = data[places].copy().view(np.uint32)[:, 0]
            found = np.where(inside, words, found)
    return found


def _store_global(x: Instruction) -> Step:
    """Stores and reductions."""
    address, size = global_address(_bracketed(x)), max(width(x), WORD)
    return lambda s, mask: _global_event(s, address(s), mask, size)


def _copy_to_shared(x: Instruction) -> Step:
    address, size = global_address(_bracketed(x, last=True)), width(x)
    return lambda s, mask: _global_event(s, address(s), mask, size)


# ---- local memory and constants ----


def _load_local(x: Instruction) -> Step:
    address, words = shared_address(_bracketed(x)), max(1, width(x) // WORD)
    results, zero = _results(x.operands[0], words), np.zeros(1, np.uint32)

    def step(s: Lanes, mask: Mask) -> Event:
        at = s.one(address(s), mask)
        for n, result in enumerate(results):
            result(s, mask, s.local.get(at + WORD * n, zero))
        return np.full((3, s.count // WARP), words, np.int64)

    return step


def _store_local(x: Instruction) -> Step:
    address, words = shared_address(_bracketed(x)), max(1, width(x) // WORD)
    _, number = register(x.operands[1])

    def step(s: Lanes, mask: Mask) -> Event:
        at = s.one(address(s), mask)
        for n in range(words):
            kept = s.local.setdefault(at + WORD * n, np.zeros(s.count, np.uint32))
            np.copyto(kept, s.r[min(number + n, RZ)], where=mask)
        return np.full((3, s.count // WARP), words, np.int64)

    return step


def _load_constant(x: Instruction) -> Step:
    results = _results(x.operands[0], 2 if "64" in x.opcode else 1)
    found = CONSTANT.fullmatch(x.operands[1])
    if found is None:
        raise ValueError(f"no constant: {x.text}")
    bank, offset = int(found[1], 16), int(found[3] or "0", 16)
    index = read(found[2]) if found[2] else None
    kept = np.uint32(2 ** (8 * min(width(x), WORD)) - 1)

    def step(s: Lanes, mask: Mask) -> None:
        at = np.full(1, offset, np.int64) + (index(s) if index else 0)
        for n, result in enumerate(results):
            words = s.constants[bank][(at + WORD * n) // WORD]
            result(s, mask, words >> (at % WORD * 8).astype(np.uint32) & kept)

    return step


# ---- mbarriers ----


def _barrier(x: Instruction) -> Step:
    """SYNCS: initialises an mbarrier, tests it, or arrives; a test always succeeds here, and it is
    the cycle model that waits."""
    address = shared_address(_bracketed(x))
    if "EXCH" in x.opcode:
        value = read(x.operands[2])

        def initialise(s: Lanes, mask: Mask) -> None:
            count = 0x100000 - (s.one(value(s), mask) >> 1)
            s.barriers[s.one(address(s), mask)] = count

        return initialise
    if "PHASECHK" in x.opcode:
        passed, parity, true = write_test(x.operands[0]), read(x.operands[2]), np.ones(1, np.bool_)

        def wait(s: Lanes, mask: Mask) -> Event:
            passed(s, mask, true)
            return _barrier_event(s, address(s), mask, parity(s))

        return wait
    return lambda s, mask: _barrier_event(s, address(s), mask)


def tests_barrier(x: Instruction) -> bool:
    """sm_80 and sm_89 test an mbarrier by a load of its second word, and by this instruction:
    whether the phase, its highest bit, differs from the parity that is waited for. If that is known
    to be 0, the bit alone is tested."""
    is_test = x.opcode[0] in ("LOP3", "ULOP3") and "0x80000000" in x.operands
    of_zero = x.operands[1:2] + x.operands[4:6] == ("RZ", "RZ", "0xc0")  # no value is wanted
    return is_test and ("0x48" in x.operands or of_zero)


def _logic_or_wait(x: Instruction) -> Step:
    if not tests_barrier(x):
        return INTEGERS[x.opcode[0]](x)
    passed, true = write_test(x.operands[0]), np.ones(1, np.bool_)
    loaded, parity = register(x.operands[2]), read(x.operands[4])

    def wait(s: Lanes, mask: Mask) -> Event:
        passed(s, mask, true)
        return _barrier_event(s, s.loaded_from[loaded] - np.uint32(WORD), mask, parity(s))

    return wait


def _arrive(x: Instruction) -> Step:
    """ATOMS.ARRIVE, and ARRIVES, which arrives when the copies of a thread have landed."""
    address = shared_address(_bracketed(x))
    return lambda s, mask: _barrier_event(s, address(s), mask)


NO_EFFECT = (
    *("NOP", "BSSY", "BSYNC", "WARPSYNC", "BREAK", "BMOV", "YIELD", "ENDCOLLECTIVE"),
    *("BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "FENCE", "CCTL"),
)
"""On registers and addresses."""
STEPS: Mapping[str, Callable[[Instruction], Step]] = {
    **INTEGERS,
    **PREDICATES,
    **ARITHMETIC,
    **dict.fromkeys(("LDS", "LDSM"), _load_shared),
    "STS": _store_shared,
    "LDG": _load_global,
    **dict.fromkeys(("STG", "RED", "REDG", "ATOMG", "ATOM"), _store_global),
    "LDGSTS": _copy_to_shared,
    "LDL": _load_local,
    "STL": _store_local,
    **dict.fromkeys(("LDC", "ULDC"), _load_constant),
    "SYNCS": _barrier,
    **dict.fromkeys(("LOP3", "ULOP3"), _logic_or_wait),
    **dict.fromkeys(("ATOMS", "ARRIVES"), _arrive),
    **dict.fromkeys(NO_EFFECT, lambda x: lambda s, mask: None),
}
"""What executes an operation, by the first part of its name; branches are in emulator.py."""


def step_of(x: Instruction) -> Step:
    """Decoded once, executed often.

    Raises:
        ValueError: the emulator does not know the operation.
    """
    make = STEPS.get(x.opcode[0])
    if make is None:
        raise ValueError(f"the emulator does not know {x.text}")
    return make(x)
