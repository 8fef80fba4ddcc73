// Gathers and bucket sums of relative position on the CPU.
//
// One thread works on one (b, h) and adds in a fixed order: no atomics, and the same bits for any
// number of threads.

#include "rpe.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace irpe::cpu {
namespace {

// Rows whose bucket sums run side by side: neighbouring keys often share a bucket, and an addition
// that waits for the one before it takes several times as long.
constexpr int kRows = 4;

// body(b, h, first row, rows) for all rows, kRows or what is left of them at a time.
template <typename Body>
void for_rows(const Sizes& s, Body body) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(s.threads)
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t h = 0; h < s.H; ++h) {
      for (int64_t i = 0; i < s.Q; i += kRows) body(b, h, i, s.Q - i < kRows ? s.Q - i : kRows);
    }
  }
}

template <typename T>
T* row_of(const Term<T>& term, int64_t b, int64_t h, int64_t i) {
  return term.data + b * term.stride_b + h * term.stride_h + i * term.stride_i;
}

template <int rows, typename T>
void add_to_buckets(const T* x, int64_t K, const int32_t* index, T* sums, int64_t stride_i) {
  for (int64_t j = 0; j < K; ++j) {
    for (int r = 0; r < rows; ++r) sums[r * stride_i + index[r * K + j]] += x[r * K + j];
  }
}

template <typename T>
void add_to_buckets(const T* x, const Sizes& s, const Term<T>& sums, int64_t b, int64_t h,
                    int64_t i, int64_t rows) {
  const int32_t* index = sums.index + i * s.K;
  T* to = row_of(sums, b, h, i);
  if (rows == kRows) return add_to_buckets<kRows>(x, s.K, index, to, sums.stride_i);
  for (int64_t r = 0; r < rows; ++r) {
    add_to_buckets<1>(x + r * s.K, s.K, index + r * s.K, to + r * sums.stride_i, 0);
  }
}

// exp(x) for x <= 0 by x = n ln 2 + r and the Cephes polynomial in r, relative error below 2e-7.
// Less than -87, -inf included, gives 0; NaN stays NaN. Free of branches, so that loops vectorise.
inline float exponential(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345191e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666665e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000u + 127u) << 23;  // the number 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

inline double exponential(double x) { return std::exp(x); }

template <typename T>
void softmax_row(T* row, int64_t K) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < K; ++j) largest = row[j] > largest ? row[j] : largest;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < K; ++j) {
    row[j] = exponential(row[j] - largest);
    sum += row[j];
  }
  const T factor = 1 / sum;
#pragma omp simd
  for (int64_t j = 0; j < K; ++j) row[j] *= factor;
}

}  // namespace

template <typename T>
void gather(const Sizes& s, const Term<const T>& term, T* out) {
  for_rows(s, [&](int64_t b, int64_t h, int64_t i, int64_t rows) {
    for (int64_t end = i + rows; i < end; ++i) {
      const T* from = row_of(term, b, h, i);
      const int32_t* index = term.index + i * s.K;
      T* row = out + ((b * s.H + h) * s.Q + i) * s.K;
#pragma omp simd
      for (int64_t j = 0; j < s.K; ++j) row[j] = from[index[j]];
    }
  });
}

template <typename T>
void bucket_sum(const Sizes& s, const T* x, const Term<T>& sums) {
  for_rows(s, [&](int64_t b, int64_t h, int64_t i, int64_t rows) {
    add_to_buckets(x + ((b * s.H + h) * s.Q + i) * s.K, s, sums, b, h, i, rows);
  });
}

template <typename T>
void softmax(const Sizes& s, T* scores, const Term<const T>* terms, int num_terms) {
  for_rows(s, [&](int64_t b, int64_t h, int64_t i, int64_t rows) {
    for (int64_t end = i + rows; i < end; ++i) {
      T* row = scores + ((b * s.H + h) * s.Q + i) * s.K;
      for (int t = 0; t < num_terms; ++t) {
        const T* from = row_of(terms[t], b, h, i);
        const int32_t* index = terms[t].index + i * s.K;
#pragma omp simd
        for (int64_t j = 0; j < s.K; ++j) row[j] += from[index[j]];
      }
      softmax_row(row, s.K);
    }
  });
}

template <typename T>
void softmax_backward(const Sizes& s, const T* grad, const T* probs, const Term<T>* sums,
                      int num_sums, T* grad_scores) {
  for_rows(s, [&](int64_t b, int64_t h, int64_t i, int64_t rows) {
    const int64_t first = ((b * s.H + h) * s.Q + i) * s.K;
    for (int64_t r = 0; r < rows; ++r) {
      const T* g = grad + first + r * s.K;
      const T* p = probs + first + r * s.K;
      T* out = grad_scores + first + r * s.K;
      T mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < s.K; ++j) mean += p[j] * g[j];
#pragma omp simd
      for (int64_t j = 0; j < s.K; ++j) out[j] = p[j] * (g[j] - mean);
    }
    for (int t = 0; t < num_sums; ++t) {
      add_to_buckets(grad_scores + first, s, sums[t], b, h, i, rows);
    }
  });
}

#define IRPE_INSTANTIATE(T)                                                                    \
  template void gather<T>(const Sizes&, const Term<const T>&, T*);                             \
  template void bucket_sum<T>(const Sizes&, const T*, const Term<T>&);                         \
  template void softmax<T>(const Sizes&, T*, const Term<const T>*, int);                       \
  template void softmax_backward<T>(const Sizes&, const T*, const T*, const Term<T>*, int, T*);
IRPE_INSTANTIATE(float)
IRPE_INSTANTIATE(double)
#undef IRPE_INSTANTIATE

}  // namespace irpe::cpu
