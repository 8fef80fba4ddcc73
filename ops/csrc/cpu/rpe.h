// The CPU kernels as binding.cpp calls them: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace irpe::cpu {

struct Sizes {
  int64_t B, H, Q, K;  // batch, heads, queries, keys
  int threads;
};

// Numbers that stand for one number per pair: of query i and key j it is
//
//   data[b * stride_b + h * stride_h + i * stride_i + index[i * K + j]]
//
// Rows (RPE on keys): data is (B, H, Q, N) and index[i, j] = b(i, j).
// Columns (RPE on queries): data is (B, H, K, N), stride_i = 0 and index[i, j] = j * N + b(j, i).
// Strides may be zero where data is only read.
template <typename T>
struct Term {
  T* data;
  const int32_t* index;
  int64_t stride_b, stride_h, stride_i;
};

// out[b, h, i, j] = the number of the pair; out is contiguous (B, H, Q, K).
template <typename T>
void gather(const Sizes& sizes, const Term<const T>& term, T* out);

// The adjoint: adds x[b, h, i, j] to the number of the pair; x is contiguous.
template <typename T>
void bucket_sum(const Sizes& sizes, const T* x, const Term<T>& sums);

// scores = softmax over j of scores + all terms; contiguous. A row of -inf becomes NaN.
template <typename T>
void softmax(const Sizes& sizes, T* scores, const Term<const T>* terms, int num_terms);

// grad_scores = probs * (grad - sum_j probs * grad), added up by bucket_sum into every term too.
template <typename T>
void softmax_backward(const Sizes& sizes, const T* grad, const T* probs, const Term<T>* sums,
                      int num_sums, T* grad_scores);

}  // namespace irpe::cpu
