"""The simulator's results: tensor cores, exchanges, asynchronous copies, barriers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.ptxsim import Simulator
from tests.ops.ptxsim.cuda import launch

pytest_plugins = ["tests.ops.ptxsim.fixtures"]
pytestmark = pytest.mark.thorough


Run = Callable[..., None]


@pytest.fixture(params=("80", "90"))
def run(simulator: Simulator, request: pytest.FixtureRequest) -> Run:
    """Launches in every order of warps and copies; nothing may be found."""

    def launch_in_all_orders(source: str, *arguments: Tensor | int, **options: int) -> None:
        for order in ("last", "random", "first"):
            with simulator.options(order=order, seed=7):
                error = launch(simulator, source, *arguments, arch=request.param, **options)
            assert error == 0, simulator.error()

    return launch_in_all_orders


MMA = r"""
extern "C" __global__ void k(const u16* a, const u16* b, const float* c, float* d) {
  const int l = threadIdx.x, g = l / 4, i = l % 4 * 2;
  float x[4];
  u32 fa[K / 4], fb[K / 8];
  for (int n = 0; n < 4; ++n) x[n] = c[(g + n / 2 * 8) * 8 + i + n % 2];
  for (int n = 0; n < K / 4; ++n) fa[n] = *(const u32*)(a + (g + n % 2 * 8) * K + i + n / 2 * 8);
  for (int n = 0; n < K / 8; ++n) fb[n] = *(const u32*)(b + g * K + i + n * 8);
#if K == 16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {%0,%1,%2,%3},"
               " {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
               : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.TYPE.TYPE.f32 {%0,%1,%2,%3},"
               " {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
               : "r"(fa[0]), "r"(fa[1]), "r"(fb[0]));
#endif
  for (int n = 0; n < 4; ++n) d[(g + n / 2 * 8) * 8 + i + n % 2] = x[n];
}
"""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [8, 16])
def test_mma_multiplies_and_adds(run: Run, dtype: torch.dtype, depth: int) -> None:
    a, b = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype)
    c, d = torch.randn(16, 8), torch.empty(16, 8)
    name = "f16" if dtype == torch.float16 else "bf16"
    run(MMA.replace("TYPE", name).replace("K", str(depth)), a, b, c, d)
    expected = (a.double() @ b.double().T + c.double()).float()
    torch.testing.assert_close(d, expected, rtol=1e-6, atol=1e-6)


def test_mma_with_truncated_sums_is_a_little_smaller(simulator: Simulator) -> None:
    a, b = torch.rand(16, 16).half(), torch.rand(8, 16).half()
    c, d = torch.rand(16, 8), torch.empty(16, 8)
    with simulator.options(truncate=True):
        assert launch(simulator, MMA.replace("TYPE", "f16").replace("K", "16"), a, b, c, d) == 0
    exact = a.double() @ b.double().T + c.double()
    assert (d.double() <= exact).all()
    torch.testing.assert_close(d, exact.float(), rtol=1e-6, atol=0)


LDMATRIX = r"""
extern "C" __global__ void k(const uint4* from, uint4* to) {
  uint4* rows = (uint4*)dynamic;
  rows[threadIdx.x] = from[threadIdx.x];
  __syncwarp();
  u32 x[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at(rows + threadIdx.x)));
  for (int n = 0; n < 4; ++n) ((u32*)to)[n * 32 + threadIdx.x] = x[n];
}
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_rows_or_columns(run: Run, transposed: bool) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.empty_like(matrices)
    run(LDMATRIX.replace("TRANS", ".trans" if transposed else ""), matrices, out, shared=512)
    assert torch.equal(out, matrices.mT if transposed else matrices)


EXCHANGES = r"""
extern "C" __global__ void k(int* out) {
  const int l = threadIdx.x;
  const u32 all = 0xFFFFFFFF;
  int* row = out + l * 8;
  row[0] = __shfl_xor_sync(all, l * 10, 5);
  row[1] = __shfl_sync(all, l * 10, l + 1, 8);
  row[2] = __shfl_up_sync(all, l * 10, 3);
  row[3] = __shfl_down_sync(all, l * 10, 3, 16);
  row[4] = __popc(__ballot_sync(all, l < 11));
  row[5] = __any_sync(all, l == 3) + 2 * __all_sync(all, l >= 0) + 4 * __all_sync(all, l > 0);
#if __CUDA_ARCH__ >= 900
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.b32 %0, 1, 0, p; }"
               : "=r"(elected));
  row[6] = elected;
#else
  row[6] = l == 0;
#endif
  row[7] = __reduce_add_sync(all, l);
}
"""


def test_exchanges_within_a_warp(run: Run) -> None:
    out = torch.empty(32, 8, dtype=torch.int32)
    run(EXCHANGES, out)
    for lane in range(32):
        assert out[lane].tolist() == [
            (lane ^ 5) * 10,
            (lane // 8 * 8 + (lane + 1) % 8) * 10,
            (lane - 3 if lane >= 3 else lane) * 10,
            (lane + 3 if lane % 16 < 13 else lane) * 10,
            11,
            3,
            int(lane == 0),
            496,
        ]


GROUPS = r"""
extern "C" __global__ void k(const uint4* from, uint4* to, int steps) {
  uint4* slots = (uint4*)dynamic;  // two of 64
  const int t = threadIdx.x;
  copy16(slots + t, from + t);
  commit();
  for (int s = 0; s < steps; ++s) {
    if (s + 1 < steps) copy16(slots + (s + 1) % 2 * 64 + t, from + (s + 1) * 64 + t);
    commit();
    wait_group<1>();
    __syncthreads();
    to[s * 64 + t] = slots[s % 2 * 64 + 63 - t];
    __syncthreads();
  }
}
"""


def test_copies_in_groups(run: Run) -> None:
    rows, out = torch.randn(5, 64, 4), torch.empty(5, 64, 4)
    run(GROUPS, rows, out, 5, threads=64, shared=2048)
    assert torch.equal(out, rows.flip(1))


# A warp fills a ring of slots, three warps empty it; full and empty slots by mbarriers.
RING = r"""
constexpr int kSlots = 3, kConsumers = 3;
extern "C" __global__ void __launch_bounds__(128) k(const uint4* from, uint4* to, int steps) {
  __shared__ u64 full[kSlots], empty[kSlots];
  uint4* slots = (uint4*)dynamic;
  const int warp = threadIdx.x / 32, l = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int n = 0; n < kSlots; ++n) init(full + n, PRODUCERS), init(empty + n, kConsumers);
  }
  __syncthreads();
  if (warp == 0) {
    for (int s = 0; s < steps; ++s) {
      const int n = s % kSlots, round = s / kSlots;
      if (round > 0) wait(empty + n, (round - 1) & 1);
      FILL
    }
  } else {
    for (int s = 0; s < steps; ++s) {
      const int n = s % kSlots;
      wait(full + n, s / kSlots & 1);
      const uint4 x = slots[n * 32 + 31 - l];
      __syncwarp();
      if (l == 0) arrive(empty + n);
      if (s % kConsumers == warp - 1) to[s * 32 + l] = x;
    }
  }
}
"""
FILL = {
    "stores": ("32", "slots[n * 32 + l] = from[s * 32 + l]; arrive(full + n);"),
    "cp.async": ("32", "copy16(slots + n * 32 + l, from + s * 32 + l);"
                 " arrive_when_copied(full + n);"),
    "bulk": ("1", "if (l == 0) { arrive_expecting(full + n, 512);"
             " copy_bulk(slots + n * 32, from + s * 32, 512, full + n); } __syncwarp();"),
}  # fmt: skip


def ring(kind: str) -> str:
    producers, fill = FILL[kind]
    return RING.replace("PRODUCERS", producers).replace("FILL", fill)


@pytest.mark.parametrize("kind", ["stores", "cp.async"])
def test_a_ring_over_mbarriers(run: Run, kind: str) -> None:
    rows, out = torch.randn(8, 32, 4), torch.empty(8, 32, 4)
    run(ring(kind), rows, out, 8, threads=128, shared=1536)
    assert torch.equal(out, rows.flip(1))


@pytest.mark.parametrize("order", ["first", "last", "random"])
def test_a_ring_of_bulk_copies(simulator: Simulator, order: str) -> None:
    rows, out = torch.randn(8, 32, 4), torch.empty(8, 32, 4)
    with simulator.options(order=order):
        error = launch(simulator, ring("bulk"), rows, out, 8, arch="90", threads=128, shared=1536)
    assert error == 0, simulator.error()
    assert torch.equal(out, rows.flip(1))


# Each thread copies a word and gives it to its neighbour; how it arrives and waits varies.
NEIGHBOUR = r"""
extern "C" __global__ void k(const uint4* from, uint4* to) {
  __shared__ u64 done;
  uint4* x = (uint4*)dynamic;
  const int t = threadIdx.x;
  if (t == 0) init(&done, 64);
  __syncthreads();
  copy16(x + t, from + t);
  WAIT
  to[t] = x[63 - t];
}
"""
WAITS = {
    "an arrival that was not expected, then one that was": """
      asm volatile("cp.async.mbarrier.arrive.shared.b64 [%0];" :: "r"(at(&done)) : "memory");
      arrive(&done);
      wait(&done, 0);""",
    "by state": """
      wait_group<0>();
      u64 state;
      asm volatile("cp.async.wait_all;" ::: "memory");
      asm volatile("mbarrier.arrive.shared.b64 %0, [%1];"
                   : "=l"(state) : "r"(at(&done)) : "memory");
      asm volatile("{ .reg .pred p;\\nAGAIN: mbarrier.test_wait.shared.b64 p, [%0], %1;\\n"
                   "@!p bra AGAIN; }" :: "r"(at(&done)), "l"(state) : "memory");""",
    "try_wait with a hint, in two pairs of braces": """
      arrive_when_copied(&done);
      for (int twice = 0; twice < 2; ++twice)
        asm volatile("{ .reg .pred p;\\nAGAIN: mbarrier.try_wait.parity.shared.b64"
                     " p, [%0], %1, 100;\\n@p bra OVER;\\nbra AGAIN;\\nOVER: }"
                     :: "r"(at(&done)), "r"(0) : "memory");""",
}


@pytest.mark.parametrize("way", WAITS)
def test_ways_to_arrive_and_to_wait(run: Run, way: str) -> None:
    rows, out = torch.randn(64, 4), torch.empty(64, 4)
    run(NEIGHBOUR.replace("WAIT", WAITS[way]), rows, out, threads=64, shared=1024)
    assert torch.equal(out, rows.flip(0))


ARITHMETIC = r"""
extern "C" __global__ void k(const int* a, const int* b, int* to) {
  const int t = threadIdx.x, x = a[t], y = b[t];
  int* row = to + t * 8;
  row[0] = x / y;
  row[1] = x % y;
  row[2] = __mulhi(x, y);
  row[3] = min(x, y) ^ max(x, 3);
  row[4] = x >> (y & 31);
  row[5] = __popc(x) * 100 + __clz(y);
  row[6] = __byte_perm(x, y, 0x5140);
  row[7] = (int)rintf(x * 0.001f) + (x < y ? 5 : 7);
}
"""


def test_arithmetic_of_integers(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-(2**31), 2**31, (2, 32), generator=generator).to(torch.int32)
    out = torch.empty(32, 8, dtype=torch.int32)
    run(ARITHMETIC, a, b, out)
    x, y = a.long(), b.long()
    assert torch.equal(out[:, 0].long(), torch.div(x, y, rounding_mode="trunc"))
    assert torch.equal(out[:, 1].long(), torch.fmod(x, y))
    assert torch.equal(out[:, 2].long(), (x * y) >> 32)
    assert torch.equal(out[:, 3], a.minimum(b) ^ a.clamp(min=3))
    assert torch.equal(out[:, 4], a >> (b & 31))
    for got, u, v in zip(out[:, 5].tolist(), a.tolist(), b.tolist(), strict=True):
        v32 = v & 0xFFFFFFFF
        assert got == bin(u & 0xFFFFFFFF).count("1") * 100 + 32 - v32.bit_length()
    low, high = a & 255, a >> 8 & 255
    mixed = [low, b & 255, high, b >> 8 & 255]
    words = sum(part.long() << (8 * n) for n, part in enumerate(mixed))
    assert torch.equal(out[:, 6].long() & 0xFFFFFFFF, words)
    assert torch.equal(
        out[:, 7], (a.float() * 0.001).round().int() + torch.where(a < b, 5, 7).int()
    )


NAMED = r"""
extern "C" __global__ void k(int* out) {
  __shared__ int x[64];
  const int t = threadIdx.x;
  if (t >= 64) {
    x[t - 64] = t;
    asm volatile("bar.arrive 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 128;" ::: "memory");
    out[t] = x[63 - t];
  }
}
"""


def test_a_named_barrier_joins_those_who_arrive_and_those_who_wait(run: Run) -> None:
    out = torch.empty(64, dtype=torch.int32)
    run(NAMED, out, threads=128)
    assert out.tolist() == list(range(127, 63, -1))


def test_counts_by_line(simulator: Simulator) -> None:
    rows, out = torch.randn(5, 64, 4), torch.empty(5, 64, 4)
    assert launch(simulator, GROUPS, rows, out, 5, threads=64, shared=2048) == 0
    line = 1 + GROUPS.splitlines().index("    to[s * 64 + t] = slots[s % 2 * 64 + 63 - t];")
    count = simulator.counts()[f"test.cu:{line}"]
    assert count.bytes == 5 * 64 * 16
    assert count.sectors == count.bytes / 32
    assert count.wavefronts == count.ideal == 5 * 2 * 4


def test_unknown_instructions_are_named(simulator: Simulator) -> None:
    source = 'extern "C" __global__ void k(float* x) { asm("brkpt;"); }'
    with pytest.raises(RuntimeError, match="unknown instruction brkpt"):
        launch(simulator, source, torch.zeros(1))


def test_other_tensors_have_the_usual_memory(ptx_simulator: Simulator) -> None:
    with ptx_simulator.watch():
        watched = torch.empty(8, dtype=torch.uint8)
    assert watched.tolist() == [0xA5] * 8
    ptx_simulator.clear()
    outside = torch.zeros(32, 8, dtype=torch.int32)
    assert launch(ptx_simulator, EXCHANGES, outside) != 0
    assert "out of bounds, global write" in ptx_simulator.findings()[0]
