// The CUDA kernels as binding.cpp and the tests call them: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace irpe::cuda {

enum class Type : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// A gather or a bucket sum. Tokens own the lookups (B, H, tokens, N); each meets all the others.
//
// Rows (RPE on keys): tokens are the queries; pairs is (B, H, tokens, others).
// Columns (RPE on queries): tokens are the keys; pairs is (B, H, others, tokens).
struct Problem {
  Type type;
  int32_t columns;  // 0: rows, 1: columns
  int64_t B, H;
  int32_t tokens, others, N;
  const int32_t* ids;  // laid out as the pairs of a gather; of a bucket sum (others, tokens)
  void* lookups;       // numbers of one token lie next to each other
  int64_t stride_b, stride_h, stride_t;
  void* pairs;  // contiguous
};

// pairs(t, o) = lookups[t, ids[t, o]]. Returns a cudaError_t.
int gather(const Problem& problem, void* stream);

// lookups[t, n] = sum over o with ids[t, o] = n of pairs(t, o). Returns a cudaError_t.
int bucket_sum(const Problem& problem, void* stream);

}  // namespace irpe::cuda
