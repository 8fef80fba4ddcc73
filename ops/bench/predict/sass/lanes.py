"""The lanes of several warps side by side, and their registers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARP = 32
Words = NDArray[np.uint32]
"""Of each lane, or one for all."""
Flags = NDArray[np.bool_]
Mask = Flags | bool
"""The lanes that an instruction is executed for; True for all."""
Memory = Mapping[int, NDArray[np.uint8]]
"""What device memory holds, by the address where it begins; all else is zero."""

RZ, URZ, PT = 255, 63, 7
"""Registers that are constant: zero, zero, true."""
STACK = 0x1000
"""Where a thread's local memory begins."""


class Lanes:
    """The state of warps that are emulated together, except where they are in the program.

    Args:
        threads: number of each lane's thread in its block.
        blocks: (3, lanes): number of each lane's block.
        constants: the constant banks.
    """

    def __init__(
        self, threads: Words, blocks: Words, constants: Mapping[int, bytes], memory: Memory
    ) -> None:
        self.count = len(threads)
        self.threads, self.blocks, self.memory = threads, blocks, memory
        self.number = np.arange(self.count)
        self.r = list(np.zeros((RZ + 1, self.count), np.uint32))
        self.ur = list(np.zeros((URZ + 1, self.count), np.uint32))
        self.p = list(np.zeros((PT + 1, self.count), np.bool_))
        self.up = list(np.zeros((PT + 1, self.count), np.bool_))
        self.p[PT][:] = self.up[PT][:] = True
        self.constants = {
            bank: np.frombuffer(data + bytes(-len(data) % 4), np.uint32)
            for bank, data in constants.items()
        }
        self.barriers: dict[int, int] = {}
        """How many arrivals complete a phase of the mbarriers, by their addresses."""
        self.local: dict[int, Words] = {}
        """Local memory, whose addresses are the same in all lanes."""
        self.loaded_from: dict[tuple[bool, int], Words] = {}
        """Where in shared memory the words of registers come from, uniform or not, by number."""

    def by_warp(self, x: NDArray[Any]) -> NDArray[Any]:
        """(warps, 32): of each lane, for all of which there may be one."""
        return np.broadcast_to(x, self.count).reshape(-1, WARP)

    def warp_any(self, x: Mask) -> Flags:
        """(lanes,): whether it holds for a lane of the warp."""
        return np.repeat(self.by_warp(np.asarray(x)).any(1), WARP)

    def first(self, x: Words, mask: Mask) -> Words:
        """(lanes,): the value of the first lane of the warp that is in the mask."""
        chosen = self.by_warp(np.asarray(mask)).argmax(1)[:, None]
        return np.repeat(np.take_along_axis(self.by_warp(x), chosen, 1), WARP)

    def one(self, x: Words, mask: Mask) -> int:
        """The value of the first lane that is in the mask."""
        return int(np.broadcast_to(x, self.count)[int(np.argmax(mask))])


Event = NDArray[np.int64]
"""(3, warps): what the cycle model must know of an access to memory."""
Step = Callable[[Lanes, Mask], Event | None]
"""An instruction executed for the lanes of a mask."""
