// What the passes of attention with relative position have in common.
//
// A warp owns one or two strips of 16 tokens of one (b, h): queries in the forward and in the first
// pass of the backward, keys in its second pass. With two, what it reads of the other tokens serves
// twice. The warps of a block own neighbouring tokens and go through all other tokens together, in
// tiles that are copied to shared memory while the last one is worked on; every key and value is
// read once a block, at any length. A block keeps its place and its head and goes from image to
// image, so that tables are read and partial sums written once.
//
// Fragments: of a 16 x 8 tile of sums, lane l = 4 g + t has sums[0], sums[1] at row g, columns 2 t
// and 2 t + 1, and sums[2], sums[3] in row g + 8.
#pragma once

#include "attention.h"
#include "plan.cuh"
#include "primitives.cuh"

namespace irpe::cuda {

constexpr int kTiles = kColumns / 8;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;

// Rows of shared memory are 16 bytes longer than a multiple of 32, so that the eight rows that
// load_matrices reads at a time lie in different banks.
template <int D>
constexpr int kPitch = D + 8;

// ---- places ----

// The numbers of one token.
template <typename T>
__device__ T* row_of(const Rows& rows, int b, int h, int token) {
  return static_cast<T*>(rows.data) + b * rows.stride_b + h * rows.stride_h + token * rows.stride_l;
}

// Where a token has its number in (B, H, L).
__device__ inline int64_t token_of(const Attention& p, int b, int h, int token) {
  return (static_cast<int64_t>(b) * p.H + h) * p.L + token;
}

template <typename T>
__device__ T* shared_at(int bytes) {
  return reinterpret_cast<T*>(shared_memory<unsigned char>() + bytes);
}

// ---- fragments ----

// a, 16 x 16, from rows [m][k] of shared memory.
template <typename T>
__device__ void load_a(uint32_t (&a)[4], const T* rows, int pitch, int lane) {
  load_matrices(a, rows + lane % 16 * pitch + lane / 16 * 8);
}

// The same from rows [k][m].
template <typename T>
__device__ void load_a_turned(uint32_t (&a)[4], const T* rows, int pitch, int lane) {
  load_matrices<true>(a, rows + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
}

// Two b, 16 x 8 each and neighbours in n, from rows [n][k].
template <typename T>
__device__ void load_b(uint32_t (&b)[2][2], const T* rows, int pitch, int lane) {
  uint32_t words[4];
  load_matrices(words, rows + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
#pragma unroll
  for (int n = 0; n < 4; ++n) b[n / 2][n % 2] = words[n];
}

// The same from rows [k][n].
template <typename T>
__device__ void load_b_turned(uint32_t (&b)[2][2], const T* rows, int pitch, int lane) {
  uint32_t words[4];
  load_matrices<true>(words, rows + lane % 16 * pitch + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < 4; ++n) b[n / 2][n % 2] = words[n];
}

// a of M strips of device memory; rows beyond L are zero.
template <typename T, int D, int M>
__device__ void load_own(uint32_t (&x)[M][D / 16][4], const Rows& rows, int b, int h, int first,
                         int L, int lane) {
#pragma unroll
  for (int half = 0; half < 2 * M; ++half) {
    const int row = first + lane / 4 + half * 8;
    const T* numbers = row_of<const T>(rows, b, h, row);
    const auto* words = reinterpret_cast<const uint32_t*>(numbers) + lane % 4;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      x[half / 2][k][half % 2] = row < L ? words[k * 8] : 0;
      x[half / 2][k][half % 2 + 2] = row < L ? words[k * 8 + 4] : 0;
    }
  }
}

// products[half] = x_r . y_r of rows g and g + 8 of a strip, y from device memory.
template <typename T, int D>
__device__ void row_products(float (&products)[2], const uint32_t (&x)[D / 16][4], const Rows& rows,
                             int b, int h, int first, int L, int lane) {
  uint32_t strip[1][D / 16][4];
  load_own<T, D>(strip, rows, b, h, first, L, lane);
  const auto& y = strip[0];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int n = half; n < 4; n += 2) {
        sum += low<T>(x[k][n]) * low<T>(y[k][n]) + high<T>(x[k][n]) * high<T>(y[k][n]);
      }
    }
    sum += shuffle_xor(sum, 1);
    products[half] = sum + shuffle_xor(sum, 2);
  }
}

// x times the factor of its row; 0 whatever x is, if that is 0.
__device__ inline float scaled(float x, float factor) { return factor == 0 ? 0.0f : x * factor; }

// The rows of device memory of which the lane has sums, times a factor for each of its two rows.
template <typename T, int D>
__device__ void store_own(const Rows& rows, int b, int h, int first, int L,
                          const float (&sums)[D / 8][4], const float (&factors)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + half * 8;
    if (row >= L) continue;
    auto* words = reinterpret_cast<uint32_t*>(row_of<T>(rows, b, h, row)) + lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      words[n * 4] = pack<T>(scaled(sums[n][half * 2], factors[half]),
                             scaled(sums[n][half * 2 + 1], factors[half]));
    }
  }
}

// sums += x rows^T in M strips: sums 16 x 8 N, x 16 x D, rows [8 N][D].
template <typename T, int D, int M, int N>
__device__ void multiply_turned(float (&sums)[M][N][4], const uint32_t (&x)[M][D / 16][4],
                                const T* rows, int lane) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[2][2];
      load_b(b, rows + n * 8 * kPitch<D> + k * 16, kPitch<D>, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(sums[m][n], x[m][k], b[0]);
        multiply_add<T>(sums[m][n + 1], x[m][k], b[1]);
      }
    }
  }
}

// sums += a rows in M strips: sums 16 x D, a 16 x 16, rows [16][D].
template <typename T, int D, int M>
__device__ void multiply(float (&sums)[M][D / 8][4], const uint32_t (&a)[M][4], const T* rows,
                         int lane) {
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    uint32_t b[2][2];
    load_b_turned(b, rows + n * 8, kPitch<D>, lane);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<T>(sums[m][n], a[m], b[0]);
      multiply_add<T>(sums[m][n + 1], a[m], b[1]);
    }
  }
}

// 16 x 32 numbers of a strip in half precision: the words of row g and of row g + 8 of each tile.
using Packed = uint32_t[kTiles][2];

// sums += packed rows in M strips: sums 16 x D, rows [32][D].
template <typename T, int D, int M>
__device__ void multiply(float (&sums)[M][D / 8][4], const Packed (&packed)[M], const T* rows,
                         int lane) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[m][e] = packed[m][2 * k + e / 2][e % 2];
    }
    multiply<T, D, M>(sums, a, rows + k * 16 * kPitch<D>, lane);
  }
}

// ---- tiles of other tokens ----

// Starts to copy `count` rows to shared memory; those beyond L become zero.
template <typename T, int D>
__device__ void start_copy(T* tile, const Rows& rows, int b, int h, int first, int L, int count,
                           int threads) {
  constexpr int kPieces = D / 8;  // of 16 bytes
  for (int n = static_cast<int>(threadIdx.x); n < count * kPieces; n += threads) {
    const int row = n / kPieces, d = n % kPieces * 8;
    const bool inside = first + row < L;
    const T* from = row_of<const T>(rows, b, h, inside ? first + row : 0) + d;
    copy_start(tile + row * kPitch<D> + d, from, inside);
  }
}

// ---- lookups ----

// Reads the table of one head. Buckets beyond N are zero; their lookups are never read, their
// bucket sums are zero too.
template <typename T, int D>
__device__ void load_table(const Target& target, const Place& at, int h, int threads) {
  T* table = shared_at<T>(at.table);
  float* bias = shared_at<float>(at.bias);
  for (int n = static_cast<int>(threadIdx.x); n < at.padded * (D + 1); n += threads) {
    const int bucket = n / (D + 1), d = n % (D + 1);
    float value = 0;
    int first = 0;
    for (int t = 0; t < target.num_terms; ++t) {
      const Term& term = target.terms[t];
      if (bucket >= first && bucket < first + term.N && (d == D) == (term.is_bias != 0)) {
        const int64_t offset = h * term.stride_h + (bucket - first) * term.stride_n;
        value = to_float(static_cast<const T*>(term.table)[offset + d % D * term.stride_d]);
      }
      first += term.N;
    }
    if (d == D) {
      bias[bucket] = value * kLog2E;
    } else {
      from_float(value, table[bucket * kPitch<D> + d]);
    }
  }
}

// lookups[r][n] = factor x_r . table[n] + bias[n] for M strips and the 16 buckets from `first` on.
template <typename T, int D, int M>
__device__ void look_up(T* lookups, const Place& at, int first, const uint32_t (&x)[M][D / 16][4],
                        float factor, int lane) {
  float sums[M][2][4] = {};
  multiply_turned<T, D>(sums, x, shared_at<T>(at.table) + first * kPitch<D>, lane);
  const float* bias = shared_at<float>(at.bias);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int bucket = first + n * 8 + lane % 4 * 2;
    const float low = bias[bucket], high = bias[bucket + 1];
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
      const float (&pair)[4] = sums[half / 2][n];
      const int e = half % 2 * 2;
      T* row = lookups + (lane / 4 + half * 8) * at.pitch;
      *reinterpret_cast<uint32_t*>(row + bucket) =
          pack<T>(pair[e] * factor + low, pair[e + 1] * factor + high);
    }
  }
}

// Of the tokens that a warp owns.
template <typename T, int D, int M>
__device__ void look_up_own(T* lookups, const Place& at, const uint32_t (&x)[M][D / 16][4],
                            float factor, int lane) {
  for (int first = 0; first < at.padded; first += 16) {
    look_up<T, D>(lookups, at, first, x, factor, lane);
  }
}

// Of a tile of other tokens, by all warps together.
template <typename T, int D>
__device__ void look_up_tile(const Place& at, const T* tile, float factor, int warps, int lane) {
  const int parts = at.padded / 16;
  for (int n = static_cast<int>(threadIdx.x) / kWarp; n < kColumns / 16 * parts; n += warps) {
    const int row = n / parts * 16;
    uint32_t x[1][D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      load_a(x[0][k], tile + row * kPitch<D> + k * 16, kPitch<D>, lane);
    }
    look_up<T, D>(shared_at<T>(at.lookups) + row * at.pitch, at, n % parts * 16, x, factor, lane);
  }
}

// The ids of the lane's pairs of a 16 x 32 tile: byte e of word n belongs to sums[n][e].
struct alignas(16) Ids {
  uint32_t words[kTiles];

  __device__ int operator()(int n, int e) const {
    return static_cast<int>(words[n] >> (e * 8) & 0xff);
  }
};

// Tiles lie row by row, in each 16 bytes for every lane.
__device__ inline Ids load_ids(const uint8_t* ids, int row, int column, int L, int lane) {
  const int strip = min(row, L - 1) / kStrip;  // one beyond the last stays where there are ids
  const int tile = strip * ((L + kColumns - 1) / kColumns) + column / kColumns;
  return reinterpret_cast<const Ids*>(ids)[tile * kWarp + lane];
}

// Adds to every pair the lookup of the token that the warp owns, or of the other one.
template <bool own, typename T>
__device__ void add_lookups(float (&sums)[kTiles][4], const Target& target, const Place& at,
                            const T* lookups, int row, int column, int L, int lane) {
  const T* mine = lookups + (own ? lane / 4 : lane % 4 * 2) * at.pitch;
  for (int t = 0; t < target.num_terms; ++t) {
    const Term& term = target.terms[t];
    const Ids ids = load_ids(own ? term.ids : term.ids_turned, row, column, L, lane);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = own ? e / 2 * 8 : n * 8 + e % 2;
        sums[n][e] += to_float(mine[token * at.pitch + ids(n, e)]);
      }
    }
    mine += term.N;
  }
}

__device__ inline bool is_hidden(const Attention& p, int b, int key) {
  return key >= p.L || (p.hidden && p.hidden[static_cast<int64_t>(b) * p.L + key]);
}

// Scores of keys beyond L and of hidden keys become -infinity.
__device__ inline void hide_columns(float (&scores)[kTiles][4], const Attention& p, int b,
                                    int column, int lane) {
  if (column + kColumns <= p.L && !p.hidden) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int key = column + n * 8 + lane % 4 * 2 + parity;
      if (is_hidden(p, b, key)) scores[n][parity] = scores[n][parity + 2] = -kInfinity;
    }
  }
}

// ---- bucket sums ----
//
// A lane adds up, in bins of its own, every other pair of columns of one row: of row g where t is
// even, of row g + 8 where it is odd. So it changes half of its numbers for half of those of its
// neighbour t ^ 1, and in the end lanes t and t ^ 2 have one row's sums together. The bins of the
// 32 lanes lie in the 32 banks.

__device__ inline void clear_bins(float* bins, int N, int lane) {
  for (int n = 0; n < N; ++n) bins[n * kWarp + lane] = 0;
}

__device__ inline void scale_bins(float* bins, int N, float factor, int lane) {
  for (int n = 0; n < N; ++n) bins[n * kWarp + lane] *= factor;
}

// Two at a time: the second read does not wait for the first write.
__device__ inline void add_to_bins(float* mine, int n0, int n1, float x0, float x1) {
  const float sum0 = mine[n0 * kWarp] + x0;
  const float sum1 = (n0 == n1 ? sum0 : mine[n1 * kWarp]) + x1;
  mine[n0 * kWarp] = sum0;
  mine[n1 * kWarp] = sum1;
}

template <typename T>
__device__ void add_to_bins(float* bins, const Target& target, const Packed& packed, int row,
                            int column, int L, int lane) {
  const bool odd = lane % 2;
  float* mine = bins + lane;
  for (int t = 0; t < target.num_terms; ++t) {
    const Ids ids = load_ids(target.terms[t].ids, row, column, L, lane);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t kept = odd ? packed[n][1] : packed[n][0];
      const uint32_t got = shuffle_xor(odd ? packed[n][0] : packed[n][1], 1);
      const uint32_t upper = ids.words[n] >> 16, lower = ids.words[n] & 0xffff;
      const uint32_t kept_ids = odd ? upper : lower, got_ids = shuffle_xor(odd ? lower : upper, 1);
      add_to_bins(mine, kept_ids & 0xff, kept_ids >> 8, low<T>(kept), high<T>(kept));
      add_to_bins(mine, got_ids & 0xff, got_ids >> 8, low<T>(got), high<T>(got));
    }
    mine += target.terms[t].N * kWarp;
  }
}

// sums[r][n] for the 16 rows of a strip, times the factor of the row.
template <typename T>
__device__ void collect_bins(T* sums, const Place& at, const float* bins, const float (&factors)[2],
                             int lane) {
  const float factor = lane % 2 ? factors[1] : factors[0];
  __syncwarp();
  T* row = sums + (lane / 4 + lane % 2 * 8) * at.pitch;
  for (int n = lane / 2 % 2; n < at.padded; n += 2) {
    const float* bin = bins + n * kWarp;
    from_float(n < at.N ? scaled(bin[lane] + bin[lane ^ 2], factor) : 0.0f, row[n]);
  }
  __syncwarp();
}

// sums += x table for the rows of the warp.
template <typename T, int D, int M>
__device__ void multiply_table(float (&sums)[M][D / 8][4], const T* x, const Place& at, int lane) {
  const T* table = shared_at<T>(at.table);
  for (int n = 0; n < at.padded; n += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a(a[m], x + m * kStrip * at.pitch + n, at.pitch, lane);
    multiply<T, D, M>(sums, a, table + n * kPitch<D>, lane);
  }
}

}  // namespace irpe::cuda
