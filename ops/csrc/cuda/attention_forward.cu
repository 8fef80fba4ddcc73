// The forward: out = softmax(scale q k^T + terms) (v + terms), and the log-sum-exp of the scores.
//
// The softmax is online (Milakov and Gimelshein, 2018), in powers of two. Sums are scaled down only
// when a score exceeds the reference of its row by more than 8, for the bins of relative position
// on values are many; until then weights may be as large as 2^8.

#include "attention.cuh"
#include "dropout.cuh"

namespace irpe::cuda {
namespace {

constexpr float kSlack = 8;

// One row's softmax so far, of the two rows of a strip of which a lane has numbers.
struct Softmax {
  float reference[2] = {-kInfinity, -kInfinity};  // what is subtracted from the scores
  float weight[2] = {};                           // sums, of this lane's columns alone

  // Moves the references up where a score is too far above; what sums have to be scaled with.
  __device__ bool move(const float (&scores)[kTiles][4], float (&factors)[2]) {
    float highest[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) highest[e / 2] = max(highest[e / 2], scores[n][e]);
    }
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = max(highest[half], shuffle_xor(highest[half], 1));
      highest[half] = max(highest[half], shuffle_xor(highest[half], 2));
      const bool exceeds = highest[half] > reference[half] + kSlack;
      factors[half] = exceeds ? exp2_fast(reference[half] - highest[half]) : 1.0f;
      if (exceeds) reference[half] = highest[half];
      weight[half] *= factors[half];
      moved = moved || exceeds;
    }
    return moved;
  }

  // The weight of a score in row g + 8 half, added to the sum.
  __device__ float weigh(float score, int half) {
    // The reference of a row with nothing but hidden keys so far is -infinity too.
    const float x = score == -kInfinity ? 0.0f : exp2_fast(score - reference[half]);
    weight[half] += x;
    return x;
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(most_warps(Pass::kForward) * kWarp)
    forward_kernel(const __grid_constant__ Attention p, const __grid_constant__ Layout at) {
  constexpr int M = strips(Pass::kForward);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, threads = at.warps * kWarp;
  const int h = static_cast<int>(blockIdx.y);
  const int own = (static_cast<int>(blockIdx.x) * at.warps + warp) * M * kStrip;
  const bool idle = own >= p.L;
  const bool on_q = p.on_q.num_terms, on_k = p.on_k.num_terms, on_v = p.on_v.num_terms;

  if (on_q) load_table<T, D>(p.on_q, at.on_q, h, threads);
  if (on_k) load_table<T, D>(p.on_k, at.on_k, h, threads);
  if (on_v) load_table<T, D>(p.on_v, at.on_v, h, threads);
  __syncthreads();

  const T* lookups_q = shared_at<T>(at.on_q.lookups);
  T* lookups_k = shared_at<T>(at.on_k.lookups) + warp * M * kStrip * at.on_k.pitch;
  T* sums_v = shared_at<T>(at.on_v.lookups) + warp * M * kStrip * at.on_v.pitch;
  float* bins_v = shared_at<float>(at.on_v.bins) + warp * M * at.on_v.N * kWarp;

  for (int b = static_cast<int>(blockIdx.z); b < p.B; b += at.groups) {
    const auto start = [&](int stage, int first) {
      T* tile = shared_at<T>(at.tiles) + stage * 2 * kColumns * kPitch<D>;
      start_copy<T, D>(tile, p.k, b, h, first, p.L, kColumns, threads);
      start_copy<T, D>(tile + kColumns * kPitch<D>, p.v, b, h, first, p.L, kColumns, threads);
      copies_commit();
    };
    start(0, 0);

    uint32_t q[M][D / 16][4];
    load_own<T, D>(q, p.q, b, h, own, p.L, lane);
    if (on_k && !idle) look_up_own<T, D>(lookups_k, at.on_k, q, at.unit, lane);
    if (on_v) clear_bins(bins_v, M * at.on_v.N, lane);
    float out[M][D / 8][4] = {};
    Softmax softmax[M];

#pragma unroll 1
    for (int column = 0; column < p.L; column += kColumns) {
      const int stage = column / kColumns % 2;
      copies_wait<0>();
      __syncthreads();  // the tile is there, and nobody reads the one before
      if (column + kColumns < p.L) start(stage ^ 1, column + kColumns);
      const T* tile_k = shared_at<const T>(at.tiles) + stage * 2 * kColumns * kPitch<D>;
      const T* tile_v = tile_k + kColumns * kPitch<D>;
      if (on_q) {
        look_up_tile<T, D>(at.on_q, tile_k, at.unit, at.warps, lane);
        __syncthreads();
      }
      if (idle) continue;

      float s[M][kTiles][4] = {};
      multiply_turned<T, D>(s, q, tile_k, lane);
      Packed weights[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int row = own + m * kStrip;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] *= at.unit;
        }
        if (on_k) {
          const T* lookups = lookups_k + m * kStrip * at.on_k.pitch;
          add_lookups<true>(s[m], p.on_k, at.on_k, lookups, row, column, p.L, lane);
        }
        if (on_q) {
          add_lookups<false>(s[m], p.on_q, at.on_q, lookups_q, row, column, p.L, lane);
        }
        hide_columns(s[m], p, b, column, lane);

        float factors[2];
        if (softmax[m].move(s[m], factors)) {
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) out[m][n][e] *= factors[e / 2];
          }
          if (on_v && column > 0) {
            float* bins = bins_v + m * at.on_v.N * kWarp;
            scale_bins(bins, at.on_v.N, lane % 2 ? factors[1] : factors[0], lane);
          }
        }
        const uint32_t dropped =
            p.dropout_p > 0 ? draw_dropped<false>(p, b * p.H + h, row, column, lane) : 0;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            s[m][n][e] = softmax[m].weigh(s[m][n][e], e / 2);
            if (dropped >> (n * 4 + e) & 1) s[m][n][e] = 0;
          }
          weights[m][n][0] = pack<T>(s[m][n][0], s[m][n][1]);
          weights[m][n][1] = pack<T>(s[m][n][2], s[m][n][3]);
        }
        if (on_v) {
          float* bins = bins_v + m * at.on_v.N * kWarp;
          add_to_bins<T>(bins, p.on_v, weights[m], row, column, p.L, lane);
        }
      }
      multiply<T, D, M>(out, weights, tile_v, lane);
    }

    if (!idle) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float share[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weight = softmax[m].weight[half];
          weight += shuffle_xor(weight, 1);
          weight += shuffle_xor(weight, 2);
          share[half] = weight > 0 ? 1 / weight : 0.0f;
          const int row = own + m * kStrip + lane / 4 + half * 8;
          if (lane % 4 == 0 && row < p.L) {
            const float lse = (softmax[m].reference[half] + log2_fast(weight)) * kLn2;
            p.lse[token_of(p, b, h, row)] = weight > 0 ? lse : kInfinity;
          }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[m][n][e] *= share[e / 2];
        }
        if (on_v) {
          const float* bins = bins_v + m * at.on_v.N * kWarp;
          collect_bins(sums_v + m * kStrip * at.on_v.pitch, at.on_v, bins, share, lane);
        }
      }
      if (on_v) multiply_table<T, D>(out, sums_v, at.on_v, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        store_own<T, D>(p.out, b, h, own + m * kStrip, p.L, out[m], {at.keep, at.keep}, lane);
      }
    }
    __syncthreads();  // the next image's first tile comes to where the last one may be
  }
}

}  // namespace

int forward(const Attention& p, void* stream) {
  return for_type_and_dim(p, [&](auto type, auto dim) {
    return launch_pass(Pass::kForward, p, forward_kernel<decltype(type), dim.value>, stream);
  });
}

}  // namespace irpe::cuda
