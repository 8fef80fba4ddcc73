"""GPUs that times are predicted for, and what the cycle model knows of them."""

import ctypes
from typing import NamedTuple

KIB = 1024


class Hardware(ctypes.Structure):
    """A multiprocessor, that of multiprocessor.cpp; in cycles unless said otherwise."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("hmma", "fma", "imad", "alu", "mufu", "uniform")),
        *((name, ctypes.c_double) for name in ("l2_bytes", "reduce_scale")),
        *((f"{x}_latency", ctypes.c_double) for x in ("shared", "l1", "l2", "memory", "constant")),
        *((f"{x}_latency", ctypes.c_double) for x in ("mufu", "hmma", "hmma_k8", "special")),
        ("barrier_latency", ctypes.c_double),
        *((name, ctypes.c_double) for name in ("taken_branch", "block_barrier", "queue")),
        *((name, ctypes.c_double) for name in ("l2_from", "l2_to")),
        *((name, ctypes.c_int32) for name in ("l1_lines", "padding")),
    )


L2_RESIDENT = (0x2000000000, 0x3000000000)
"""Addresses that stand for what all blocks read, so that it is in L2: the maps of classes."""

COMMON = {
    # 16 lanes of a partition, or 4: the CUDA C++ Programming Guide, throughput of instructions.
    **dict.fromkeys(("imad", "alu", "uniform"), 2),
    "mufu": 8,
    # What a multiprocessor gets from L2 in a cycle when all of them read.
    "l2_bytes": 24,
    "reduce_scale": 2,
    # Near what microbenchmarks find: Jia et al., arXiv:1804.06826; Luo et al., arXiv:2402.13499.
    "shared_latency": 24,
    "l1_latency": 35,
    "l2_latency": 270,
    "memory_latency": 450,
    "constant_latency": 40,
    "mufu_latency": 22,
    "hmma_latency": 24,
    "hmma_k8_latency": 18,
    "special_latency": 25,
    "barrier_latency": 20,
    # Assumed: times of FlashAttention-2 change by a few per cent when they are doubled or left out.
    "taken_branch": 8,
    "block_barrier": 20,
    "queue": 32,
    "l2_from": L2_RESIDENT[0],
    "l2_to": L2_RESIDENT[1],
}
"""What is taken to be the same on every GPU here."""


class GPU(NamedTuple):
    """A GPU. Sources: NVIDIA's data sheets, and the CUDA C++ Programming Guide's table of technical
    specifications by compute capability."""

    name: str
    architecture: str
    num_sms: int
    gigahertz: float
    shared_bytes: int
    """Of a multiprocessor; a block can have 1 KiB less."""
    l1_bytes: int
    """Of L1 and shared memory together."""
    carveouts: tuple[int, ...]
    """How much of them can be shared memory, KiB."""
    hmma: float
    """Cycles of a partition's tensor core for a m16n8k16 of halves with float32 sums, 4096 FLOP."""
    fma: float
    """Cycles of a partition for a float32 operation of a warp."""
    gigabytes_per_second: float
    """Of device memory."""

    @property
    def block_bytes(self) -> int:
        """Shared memory that a block can have."""
        return self.shared_bytes - KIB

    def resident(self, shared_bytes: int, threads: int, registers: int) -> int:
        """Blocks that a multiprocessor holds at a time.

        Args:
            shared_bytes: of a block, to which the system adds 1 KiB.
            registers: of a thread, given by eights to a warp.
        """
        of_warp = -(-registers // 8) * 8 * 32
        by_registers = 65536 // of_warp // (threads // 32)
        return min(self.shared_bytes // (shared_bytes + KIB), by_registers, 1536 // threads)

    def hardware(self, shared_bytes: int) -> Hardware:
        """Of a multiprocessor whose blocks take this much shared memory, which L1 does not have."""
        needed = min(shared_bytes, self.carveouts[-1] * KIB)
        carveout = next(x for x in self.carveouts if x * KIB >= needed)
        l1_lines = (self.l1_bytes - carveout * KIB) // 128
        return Hardware(**COMMON, hmma=self.hmma, fma=self.fma, l1_lines=l1_lines)

    def microseconds(self, cycles: float) -> float:
        return cycles / self.gigahertz / 1e3

    def microseconds_of(self, num_bytes: float) -> float:
        """To move them to or from device memory, at its full rate."""
        return num_bytes / self.gigabytes_per_second / 1e3


GPUS = {
    gpu.name: gpu
    for gpu in (
        # mma.sync reaches 0.63 of the 989 TFLOP/s of wgmma, which are 4 cycles.
        GPU(
            *("H100", "sm_90", 132, 1.755, 228 * KIB, 256 * KIB),
            *((0, 8, 16, 32, 64, 100, 132, 164, 196, 228), 6.3, 1, 3350),
        ),
        # 312 TFLOP/s are 8 cycles.
        GPU(
            *("A100", "sm_80", 108, 1.41, 164 * KIB, 192 * KIB),
            *((0, 8, 16, 32, 64, 100, 132, 164), 8.1, 2, 2039),
        ),
        # 362 TFLOP/s are 16.2 cycles; a GeForce of the same architecture takes twice as many.
        GPU(
            *("L40S", "sm_89", 142, 2.52, 100 * KIB, 128 * KIB),
            *((0, 8, 16, 32, 64, 100), 16.2, 1, 864),
        ),
        # 111 TFLOP/s are 16 cycles.
        GPU(
            *("RTX A5000", "sm_86", 64, 1.695, 100 * KIB, 128 * KIB),
            *((0, 8, 16, 32, 64, 100), 16.2, 1, 768),
        ),
    )
}
