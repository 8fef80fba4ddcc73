"""The simulator finds what is planted in small kernels, and nothing where it is not."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.ops.ptxsim import Simulator
from tests.ops.ptxsim.cuda import launch
from tests.ops.test_ptxsim import GROUPS, ring

pytest_plugins = ["tests.ops.ptxsim.fixtures"]
pytestmark = pytest.mark.thorough


def kernel(body: str) -> str:
    head = 'extern "C" __global__ void k(float* in, float* out, int n) {'
    return f"{head}\n  const int t = threadIdx.x;\n{body}\n}}"


COPY = kernel("  if (t < n) out[t] = in[t];")
HALVES = kernel("  if (t < 32) ((float2*)out)[t] = *(const float2*)(in + t * 2);")
SHARED = kernel("""
  __shared__ float x[64];
  x[t] = in[t];
  __syncthreads();
  out[t] = x[63 - t];
""")
WITHIN_WARP = kernel("""
  __shared__ float x[64];
  x[t] = in[t];
  __syncwarp();
  out[t] = x[t ^ 1];
  __syncwarp();
  x[t] += 1;
  out[64 + t] = x[t];
""")
TWICE = kernel("""
  __shared__ float x[64];
  for (int s = 0; s < 3; ++s) {
    x[t] = in[t] + s;
    __syncthreads();
    out[t] = x[63 - t];
    __syncthreads();
  }
""")
BLOCKS = kernel("  out[blockIdx.x * 64 + t] = in[t];")
REDUCTION = kernel("  atomicAdd(out, in[t]);")
SUM_IN_SHARED = kernel("""
  __shared__ float sum;
  if (t == 32) sum = 0;
  __syncthreads();  // zero
  atomicAdd(&sum, in[t]);
  __syncthreads();
  if (t == 0) *out = sum;
""")
DIVERGENT = kernel("""
  float x = in[t];
  if (n > 0) x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  __syncwarp();
  out[t] = x;
""")
TRAP = kernel("  if (t >= n) __trap();\n  out[t] = in[t];")
DYNAMIC = kernel("  float* x = (float*)dynamic;\n  x[t] = in[t];\n  out[t] = x[t];")
ONE_WAITS = kernel("""
  __shared__ u64 done;
  __shared__ float x[64];
  if (t == 0) init(&done, 32);
  __syncthreads();
  if (t < 32) {
    x[t] = in[t];
    arrive(&done);
  } else {
    if (t == 32) wait(&done, 0);
    __syncwarp();
    out[t] = x[63 - t];
  }
""")
ONE_ARRIVES = kernel("""
  __shared__ u64 done;
  __shared__ float x[64];
  if (t == 0) init(&done, 1);
  __syncthreads();
  if (t < 32) {
    x[t] = in[t];
    __syncwarp();
    if (t == 0) arrive(&done);
  } else {
    wait(&done, 0);
    out[t] = x[63 - t];
  }
""")


@dataclass(frozen=True)
class Fault:
    """A kernel, the text that makes it wrong, and what is to be found."""

    source: str
    old: str
    new: str
    found: str
    n: int = 64
    options: dict[str, Any] = field(default_factory=dict)


RING = {"threads": 128, "shared": 1536}
FAULTS = {
    "read out of bounds": Fault(COPY, "in[t]", "in[t + 1]", "out of bounds, global read"),
    "written out of bounds": Fault(COPY, "out[t]", "out[t + 1]", "out of bounds, global write"),
    "misaligned": Fault(HALVES, "(in + t * 2)", "(in + t)", "misaligned, global"),
    "unwritten global memory": Fault(COPY, "in[t]", "out[t] + 1", "uninitialised, global"),
    "unwritten shared memory": Fault(
        SHARED, "x[t] = in", "x[t & 31] = in", "uninitialised, shared"
    ),
    "shared memory out of bounds": Fault(SHARED, "x[63 - t]", "x[64 + t]", "out of bounds, shared"),
    "no __syncthreads": Fault(
        SHARED, "__syncthreads();", "__syncwarp();", "race, shared, read after write"
    ),
    "no __syncthreads before the next write": Fault(
        TWICE, "t];\n    __syncthreads();\n  }", "t];\n  }", "race, shared, write after read"
    ),
    "no __syncwarp": Fault(
        WITHIN_WARP, "__syncwarp();\n  out", "out", "race, shared, read after write"
    ),
    "no __syncwarp before a write": Fault(
        WITHIN_WARP, "__syncwarp();\n  x[t]", "x[t]", "race, shared, write after read"
    ),
    "two warps write": Fault(SHARED, "x[t] =", "x[t % 32] =", "race, shared, write after write"),
    "read before wait_group": Fault(
        GROUPS, "wait_group<1>", "wait_group<2>", "asynchronous copy under way, read", 3,
        {"shared": 2048},
    ),
    "copies that nobody waits for": Fault(
        GROUPS, "s + 1 < steps", "true", "asynchronous copy under way, at the end", 3,
        {"shared": 2048},
    ),
    "no wait for a full slot": Fault(
        ring("stores"), "wait(full + n, s / kSlots & 1);", "", "race, shared, read after write", 8,
        RING,
    ),
    "no wait for a copied slot": Fault(
        ring("cp.async"), "wait(full + n, s", "if (s > 1) wait(full + n, s",
        "asynchronous copy under way, read", 8, RING,
    ),
    "slot overwritten before it is released": Fault(
        ring("stores"), "if (round > 0) wait(empty", "if (round > 9) wait(empty",
        "race, shared, write after read", 8, RING,
    ),
    "slot copied over before it is released": Fault(
        ring("cp.async"), "wait(empty + n, (round - 1) & 1)", "wait(empty + n, round & 1)",
        "asynchronous copy under way, written", 8, RING,
    ),
    "released before all lanes have read": Fault(
        ring("stores"), "__syncwarp();\n      if (l == 0)", "if (l == 0)",
        "race, shared, write after read", 8, RING,
    ),
    "no arrival": Fault(
        ring("stores"), "if (l == 0) arrive(empty + n);", "", "deadlock", 8, RING
    ),
    "too many arrivals": Fault(
        ring("stores"), "if (l == 0) arrive(empty + n);", "arrive(empty + n);",
        "deadlock", 8, RING,
    ),
    "more arrivals at once than are expected": Fault(
        ring("stores"), "arrive(empty + n);", "arrive(empty + n, 4);",
        "more arrivals at an mbarrier than it expects", 8, RING,
    ),
    "mbarrier used before it is initialised": Fault(
        ring("stores"), "  __syncthreads();\n", "", "without a barrier after its init", 8, RING
    ),
    "mbarrier never initialised": Fault(
        ONE_ARRIVES, "if (t == 0) init(&done, 1);", "", "mbarrier not initialised"
    ),
    "mbarrier initialised again": Fault(
        ONE_ARRIVES, "if (t == 0) init(&done, 1);", "if (t == 0) init(&done, 1), init(&done, 1);",
        "mbarrier.init of an mbarrier in use",
    ),
    "fewer bytes expected than copied": Fault(
        ring("bulk"), "arrive_expecting(full + n, 512)", "arrive_expecting(full + n, 256)",
        "deadlock", 8, {**RING, "arch": "90"},
    ),
    "no wait for a bulk copy": Fault(
        ring("bulk"), "wait(full + n, s", "if (s > 1) wait(full + n, s",
        "asynchronous copy under way, read", 8, {**RING, "arch": "90"},
    ),
    "one lane waits, no __syncwarp": Fault(
        ONE_WAITS, "__syncwarp();\n    out", "out", "race, shared, write after read"
    ),
    "no __syncwarp before one lane arrives": Fault(
        ONE_ARRIVES, "__syncwarp();\n    if", "if", "race, shared, read after write"
    ),
    "plain store to an mbarrier": Fault(
        ONE_ARRIVES, "arrive(&done)", "arrive(&done), done = 0", "plain access to an mbarrier"
    ),
    "instruction of a warp by some lanes": Fault(
        DIVERGENT, "n > 0", "t & 1", "threads of a warp wait at different instructions"
    ),
    "one thread at another barrier": Fault(
        SHARED, "__syncthreads();", "t ? __syncthreads() : __syncwarp();",
        "threads of a warp wait at different instructions",
    ),
    "trap": Fault(TRAP, "t >= n", "t > 62", "trap"),
    "atomic sum in unwritten memory": Fault(
        SUM_IN_SHARED, "__syncthreads();  // zero", "", "uninitialised, shared", 64
    ),
    "two blocks write": Fault(
        BLOCKS, "blockIdx.x * 64 + t", "t", "race, global, other block, write after write", 64,
        {"grid": 2},
    ),
    "two blocks read and write": Fault(
        BLOCKS, "= in[t]", "= in[t] + out[63 - t] * 0", "race, global, other block", 64,
        {"grid": 2},
    ),
    "sum of a block, not atomic": Fault(
        REDUCTION, "atomicAdd(out, in[t])", "*out += in[t]", "race, global", 64, {"grid": 2}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("planted", [False, True], ids=["right", "planted"])
def test_a_fault_is_found(simulator: Simulator, name: str, planted: bool) -> None:
    fault = FAULTS[name]
    assert fault.source.count(fault.old) == 1, "the kernel has changed"
    source = fault.source.replace(fault.old, fault.new) if planted else fault.source
    rows = torch.randn(1024)
    if "bounds" in name or name == "misaligned":
        rows = rows[:64].clone()
    out = torch.empty(64) if "bounds" in name or "unwritten" in name else torch.zeros(1024)
    errors = []
    for order in ("first", "last", "random"):
        with simulator.options(order=order):
            options = {"threads": 64, **fault.options}
            if launch(simulator, source, rows, out, fault.n, **options):
                errors.append(simulator.error())
    if planted:
        assert any(fault.found in line for line in simulator.findings()), simulator.findings()
        assert any(fault.found in error for error in errors)
    else:
        assert not errors


def test_a_finding_names_the_places_in_the_source(simulator: Simulator) -> None:
    fault = FAULTS["no __syncwarp"]
    source = fault.source.replace(fault.old, fault.new)
    inputs = torch.zeros(64), torch.empty(128), 64
    assert launch(simulator, source, *inputs, threads=64) != 0
    (line,) = simulator.findings()
    assert "128 x race, shared, read after write at test.cu:6 and test.cu:5" in line
    with simulator.options(strict=False):
        assert launch(simulator, source, *inputs, threads=64) == 0


SHARED_BYTES = {  # dynamic bytes, opt-in: error of an sm_86
    (48 << 10, 0): None,
    (49 << 10, 0): "49152 are allowed without cuFuncSetAttribute",
    (49 << 10, 64 << 10): None,
    (99 << 10, 99 << 10): None,
    (100 << 10, 100 << 10): "the architecture has 101376",
}


@pytest.mark.parametrize(("wanted", "message"), SHARED_BYTES.items())
def test_limits_of_shared_memory(
    simulator: Simulator,
    wanted: tuple[int, int],
    message: str | None,
) -> None:
    shared, opt_in = wanted
    inputs = torch.zeros(64), torch.empty(64), 64
    with simulator.architecture("86"):
        error = launch(simulator, DYNAMIC, *inputs, threads=64, shared=shared, opt_in=opt_in)
    assert (error != 0) == (message is not None)
    if message:
        assert message in simulator.error()


def test_limits_of_threads(simulator: Simulator) -> None:
    inputs = torch.zeros(2048), torch.empty(2048), 2048
    assert launch(simulator, COPY, *inputs, threads=1056) != 0
    assert "block of 1056 threads" in simulator.error()
    bounded = COPY.replace("void k", "void __launch_bounds__(64) k")
    assert launch(simulator, bounded, *inputs, threads=96) != 0
    assert "__launch_bounds__ says 64" in simulator.error()
