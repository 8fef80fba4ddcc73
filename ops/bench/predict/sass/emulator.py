"""Follows warps through a program: which instructions each issues, and what it accesses.

All data is zero but what decides where a kernel goes: its parameters and the maps of classes.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from irpe_ds.ops.bench.predict.sass.cubin import INSTRUCTION_BYTES, Program
from irpe_ds.ops.bench.predict.sass.lanes import STACK, Event, Flags, Lanes, Mask, Memory, Step
from irpe_ds.ops.bench.predict.sass.memory import step_of
from irpe_ds.ops.bench.predict.sass.operands import Test, conjunction, is_predicate, register, test

ABSENT, EXECUTED, TAKEN, OFF = range(4)
"""What an instruction is to a warp: OFF if its predicate holds in no lane, TAKEN a branch."""
RECORD = np.dtype(
    [("x", "<i8"), ("y", "<i4"), ("z", "<i4"), ("index", "<i4"), ("state", "<i4")], align=True
)
"""An instruction that a warp has issued: its number in the program, its state and its event."""
Trace = NDArray[np.void]
"""The records of a warp, in order."""
MOST = 20_000_000
"""Instructions that are followed before a loop is taken for endless."""


class Launch(NamedTuple):
    """What some warps are started with."""

    params: bytes
    threads: int
    """Of a block."""
    grid: tuple[int, int, int]
    blocks: tuple[tuple[int, int, int], ...]
    """Numbers of the blocks to follow."""
    memory: Memory


class Traces(NamedTuple):
    """What the warps have done, block by block."""

    warps: list[Trace]
    barriers: dict[int, int]
    """Arrivals that complete a phase of each mbarrier, by address."""


class Decoded(NamedTuple):
    """An instruction, ready to be executed."""

    guard: Test | None
    """Which lanes it is for."""
    step: Step | None
    """None for a branch."""
    goes_to: Callable[[Lanes], NDArray[np.int64] | int]
    """Of a branch: the number of the next instruction."""


class Emulator:
    """Executes the warps of some blocks, each for itself.

    Those at the lowest address go first, together, as lanes of a warp do: so they meet again after
    a branch. None waits for another, since data is zero whenever it is read.
    """

    def __init__(self, program: Program, launch: Launch) -> None:
        self.program = program
        self.lanes = _start(program, launch)
        self.end = len(program.instructions)
        self.at = np.zeros(self.lanes.count, np.int64)  # `end` for lanes that have exited
        self.decoded: list[Decoded | None] = [None] * self.end
        # Of all warps together, an entry for each instruction:
        self.indices: list[int] = []
        self.states: list[NDArray[np.int8]] = []
        self.events: dict[int, Event] = {}

    def run(self) -> Traces:
        """From the first instruction to the last.

        Raises:
            ValueError: an unknown instruction.
            RuntimeError: a loop without end.
        """
        with np.errstate(all="ignore"):
            while (here := int(self.at.min())) < self.end:
                group = self.at == here
                others = self.at[~group]
                self._advance(here, group, int(others.min()) if len(others) else self.end)
                if len(self.indices) > MOST:
                    raise RuntimeError(f"{self.program.name} does not end")
        return Traces(self._traces(), self.lanes.barriers)

    def _advance(self, here: int, group: Flags, stop: int) -> None:
        """Take the lanes of a group on until they part, or meet those at `stop`."""
        lanes, everyone = self.lanes, True if group.all() else group
        present = lanes.by_warp(group).any(1)
        executed, taken, off = (
            np.where(present, state, ABSENT).astype(np.int8) for state in (EXECUTED, TAKEN, OFF)
        )
        while here < stop:
            guard, step, goes_to = self.decoded[here] or self._decode(here)
            mask = everyone if guard is None else _both(everyone, guard(lanes))
            state = taken if step is None else executed
            if mask is not everyone:
                runs = lanes.by_warp(np.asarray(mask)).any(1)
                state = np.where(runs, state, off)
            self.indices.append(here)
            self.states.append(state)
            if mask is everyone or runs.any():
                if step is None:
                    np.copyto(self.at, here + 1, where=group)
                    np.copyto(self.at, goes_to(lanes), where=mask)
                    return
                event = step(lanes, mask)
                if event is not None:
                    self.events[len(self.indices) - 1] = event
            here += 1
        np.copyto(self.at, here, where=group)

    def _decode(self, here: int) -> Decoded:
        x = self.program.instructions[here]
        tests = [test(x.guard)] if x.guard else []
        kind = x.opcode[0]
        if kind not in ("BRA", "CALL", "RET", "EXIT"):
            decoded = Decoded(conjunction(tests), step_of(x), lambda s: here + 1)
        elif kind == "EXIT":
            decoded = Decoded(conjunction(tests), None, lambda s: self.end)
        elif kind == "RET":
            _, number = register(x.operands[0])
            decoded = Decoded(
                conjunction(tests),
                None,
                lambda s: s.r[number].astype(np.int64) // INSTRUCTION_BYTES,
            )
        else:
            found = re.search(r"`\((.*)\)", x.text)
            assert found is not None
            target = self.program.labels[found[1]]
            tests += [test(each) for each in x.operands if is_predicate(each)]
            if "DIV" in x.opcode:  # to where a warp goes whose lanes are apart
                tests = [lambda s: np.zeros(s.count, np.bool_)]
            decoded = Decoded(conjunction(tests), None, lambda s: target)
        self.decoded[here] = decoded
        return decoded

    def _traces(self) -> list[Trace]:
        """Apart for each warp."""
        states = np.stack(self.states)
        indices = np.array(self.indices, np.int32)
        places = np.array(list(self.events), np.int64)
        events = np.array(list(self.events.values())).reshape(len(places), 3, -1)
        found = []
        for warp in range(states.shape[1]):
            trace = np.zeros(len(indices), RECORD)
            trace["index"], trace["state"] = indices, states[:, warp]
            for n, name in enumerate("xyz"):
                trace[name][places] = events[:, n, warp]
            found.append(trace[trace["state"] != ABSENT])
        return found


def _both(group: Mask, holds: Flags) -> Mask:
    """The lanes of a group for which it holds, as the group itself if that is all of them."""
    if group is True:
        return True if holds.all() else holds.copy()
    mask = group & holds
    return group if (mask == group).all() else mask


def _start(program: Program, launch: Launch) -> Lanes:
    """Bank 0 begins with the sizes of block and grid, and ends with the parameters."""
    constants = dict(program.constants)
    bank = bytearray(constants[0])
    bank[:24] = np.array([launch.threads, 1, 1, *launch.grid], np.uint32).tobytes()
    bank[0x28:0x2C] = np.uint32(STACK).tobytes()
    bank[len(bank) - len(launch.params) :] = launch.params
    constants[0] = bytes(bank)
    threads = np.tile(np.arange(launch.threads, dtype=np.uint32), len(launch.blocks))
    blocks = np.repeat(np.array(launch.blocks, np.uint32).T, launch.threads, axis=1)
    return Lanes(threads, blocks, constants, launch.memory)
