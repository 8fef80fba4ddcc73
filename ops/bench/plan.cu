// Prints the launch configurations of the fused passes; resources.py compiles and runs it.
//
// Arguments: multiprocessors, bytes of shared memory of one and of a block, B, H, L, D, and the
// buckets on queries, keys and values.

#include <cstdio>
#include <cstdlib>

#include "cuda/plan.cuh"

int main(int, char** argument) {
  using namespace irpe::cuda;
  const auto next = [&] { return std::atoi(*++argument); };
  Device gpu = {};
  gpu.processors = next(), gpu.processor_shared = next(), gpu.block_shared = next();
  Attention p = {};
  p.B = next(), p.H = next(), p.L = next(), p.D = next();
  for (Target* target : {&p.on_q, &p.on_k, &p.on_v}) {
    target->terms[0].N = next();
    target->num_terms = target->terms[0].N > 0;
  }
  for (const Pass pass : {Pass::kForward, Pass::kQueries, Pass::kKeys}) {
    const Layout at = plan(pass, p, gpu);
    std::printf("%d %d %d %d\n", at.warps, at.blocks, at.bytes, at.chunks * p.H * at.groups);
  }
}
