// The kernels as they are in ops/csrc, compiled for the host, with names that Python finds.

#include "cuda/rpe.cu"
#include "faults.cu"

extern "C" {

void reverse_threads(int reversed) { irpe::cuda::host::g_reversed = reversed; }

int run_gather(const irpe::cuda::Problem* problem) {
  return irpe::cuda::gather(*problem, nullptr);
}

int run_bucket_sum(const irpe::cuda::Problem* problem) {
  return irpe::cuda::bucket_sum(*problem, nullptr);
}

}
