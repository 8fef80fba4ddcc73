// Attention with relative position as binding.cpp and the host harness call it: no torch.
#pragma once

#include <cstdint>

#include "rpe.h"

namespace irpe::cuda {

constexpr int kMostTerms = 2;      // on queries, keys or values each
constexpr int kMostBuckets = 256;  // ids are bytes

// Rows of D numbers that lie next to each other, one for each token of (B, H, L); a row starts at a
// multiple of 16 bytes.
struct Rows {
  void* data;
  int64_t stride_b, stride_h, stride_l;
};

// A table and the map that reads it. The lookup of owner o against another token x is
// table[:, ids(o, x)]; terms on queries are owned by the keys, all others by the queries.
struct Term {
  const void* table;  // number (h, d, n); of a bias (h, n)
  int64_t stride_h, stride_d, stride_n;
  int32_t N;
  int32_t is_bias;
  const uint8_t* ids;         // (owner, other) in tiles, see load_ids of attention.cuh
  const uint8_t* ids_turned;  // (other, owner) in tiles
};

// Relative position on queries, keys or values. The buckets of its terms are numbered through.
struct Target {
  int32_t num_terms;
  Term terms[kMostTerms];
  float* grad_table;  // (H, slots, padded, D): partial sums of a backward; null without a table
  float* grad_bias;   // (H, slots, padded): the same of biases
};

// Buckets of all its terms, up to a multiple of what a matrix instruction takes.
inline int padded_buckets(const Target& target) {
  int n = 0;
  for (int t = 0; t < target.num_terms; ++t) n += target.terms[t].N;
  return (n + 15) / 16 * 16;
}

struct Attention {
  Type type;  // kFloat16 or kBFloat16
  int32_t B, H, L, D;
  Rows q, k, v, out;
  Rows grad_out, grad_q, grad_k, grad_v;  // of a backward
  float* lse;    // (B, H, L): log of the sum of exp(scores); infinity where no key is left
  float* delta;  // (B, H, L): sum over d of grad_out * out; the pass over queries writes it
  Target on_q, on_k, on_v;
  const uint8_t* hidden;  // (B, L), not zero where a key must not be attended to; may be null
  const int64_t* seed;    // of the dropout, one number; not read when dropout_p is 0
  float scale, dropout_p;
  // Leading queries that have one bucket with all keys, in every term on keys. Such a term adds a
  // constant to the row, so its gradient there is 0, and not the rounding errors of a sum.
  int32_t skip;
};

// Whether one warp's lookups and bucket sums find room in shared memory, in the backward too.
bool fits(const Attention& problem);

// Both return a cudaError_t; the problem fits.
int forward(const Attention& problem, void* stream);
int backward(const Attention& problem, void* stream);

// How many partial sums of a table a backward writes for each head.
struct Slots {
  int on_q, on_kv;  // of tables on queries; of tables on keys and on values
};
Slots slots(const Attention& problem);

}  // namespace irpe::cuda
