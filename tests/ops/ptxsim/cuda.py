"""Kernels of the simulator's own tests: from a string to a launch."""

import ctypes
import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from irpe_ds.ops.build.nvrtc import compile_kernel
from tests.ops.ptxsim.simulator import Simulator

PRELUDE = r"""
typedef unsigned u32; typedef unsigned long long u64; typedef unsigned short u16;
extern __shared__ __align__(128) unsigned char dynamic[];
#define DEVICE static __device__ __forceinline__
DEVICE u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void init(u64* b, u32 n) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(at(b)), "r"(n) : "memory");
}
DEVICE void arrive(u64* b, u32 count = 1) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0], %1; }"
               :: "r"(at(b)), "r"(count) : "memory");
}
DEVICE bool over(u64* b, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
               "selp.b32 %0, 1, 0, p; }" : "=r"(done) : "r"(at(b)), "r"(parity) : "memory");
  return done;
}
DEVICE void wait(u64* b, u32 parity) { while (!over(b, parity)) {} }
DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at(to)), "l"(from) : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_group() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
DEVICE void arrive_when_copied(u64* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(at(b)) : "memory");
}
#if __CUDA_ARCH__ >= 900
DEVICE void arrive_expecting(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               :: "r"(at(b)), "r"(bytes) : "memory");
}
DEVICE void copy_bulk(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1], %2, [%3];"
               :: "r"(at(to)), "l"(from), "r"(bytes), "r"(at(b)) : "memory");
}
#endif
"""


@functools.cache
def compile_ptx(source: str, arch: str) -> bytes:
    """PTX with line numbers, those of `source`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.cu"
        path.write_text(PRELUDE + '#line 1 "test.cu"\n' + source)
        return compile_kernel(path, {}, f"compute_{arch}")


def launch(
    simulator: Simulator,
    source: str,
    *arguments: Tensor | int,
    arch: str = "80",
    grid: int = 1,
    threads: int = 32,
    shared: int = 0,
    opt_in: int = 0,
) -> int:
    """Compiles and runs kernel `k`; the error of cuFuncSetAttribute or cuLaunchKernel, or 0."""
    driver, module, kernel = simulator.driver, ctypes.c_void_p(), ctypes.c_void_p()
    image = compile_ptx(source, arch)
    if error := driver.cuModuleLoadData(ctypes.byref(module), image):
        raise RuntimeError(simulator.error())
    assert driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"k") == 0
    if opt_in and (error := driver.cuFuncSetAttribute(kernel, 8, opt_in)):
        return error
    values = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a)
        for a in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    return driver.cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, shared, None, pointers, None)
