// The forward: out = softmax(scale q k^T + terms) (v + terms), and the log-sum-exp of the scores.
//
// The softmax is online (Milakov and Gimelshein, 2018), in powers of two. Sums are scaled down only
// when a score exceeds the reference of its row by more than 8, for the bins of relative position
// on values are many; until then weights may be as large as 2^8.

#include "attention.cuh"

namespace irpe::cuda {
namespace {

constexpr float kSlack = 8;

template <typename T, int D>
__global__ void __launch_bounds__(most_warps(Pass::kForward) * kWarp)
    forward_kernel(const __grid_constant__ Attention p, const __grid_constant__ Layout at) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, threads = at.warps * kWarp;
  const int h = static_cast<int>(blockIdx.y);
  const int own = (static_cast<int>(blockIdx.x) * at.warps + warp) * kRows;
  const bool idle = own >= p.L;
  const bool on_q = p.on_q.num_terms, on_k = p.on_k.num_terms, on_v = p.on_v.num_terms;

  if (on_q) load_table<T, D>(p.on_q, at.on_q, h, threads);
  if (on_k) load_table<T, D>(p.on_k, at.on_k, h, threads);
  if (on_v) load_table<T, D>(p.on_v, at.on_v, h, threads);
  __syncthreads();

  T* lookups_q = shared_at<T>(at.on_q.lookups);
  T* lookups_k = shared_at<T>(at.on_k.lookups) + warp * kRows * at.on_k.pitch;
  T* sums_v = shared_at<T>(at.on_v.lookups) + warp * kRows * at.on_v.pitch;
  float* bins_v = shared_at<float>(at.on_v.bins) + warp * at.on_v.N * kWarp;

  for (int b = static_cast<int>(blockIdx.z); b < p.B; b += at.groups) {
    const auto start = [&](int stage, int first) {
      T* tile = shared_at<T>(at.tiles) + stage * 2 * kColumns * kPitch<D>;
      start_copy<T, D>(tile, p.k, b, h, first, p.L, kColumns, threads);
      start_copy<T, D>(tile + kColumns * kPitch<D>, p.v, b, h, first, p.L, kColumns, threads);
      copies_commit();
    };
    start(0, 0);

    uint32_t q[D / 16][4];
    load_own<T, D>(q, p.q, b, h, own, p.L, lane);
    if (on_k && !idle) look_up_own<T, D>(lookups_k, at.on_k, q, at.unit, lane);
    if (on_v) clear_bins(bins_v, at.on_v.N, lane);
    __syncwarp();
    float out[D / 8][4] = {};
    float reference[2] = {-kInfinity, -kInfinity}, weight[2] = {};

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

      float s[kTiles][4] = {};
      multiply_turned<T, D>(s, q, tile_k, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= at.unit;
      }
      if (on_k) add_lookups<true>(s, p.on_k, at.on_k, lookups_k, own, column, p.L, lane);
      if (on_q) {
        add_lookups<false>(s, p.on_q, at.on_q, lookups_q, own, column, p.L, lane);
      }
      hide_columns(s, p, b, column, lane);

      float highest[2] = {-kInfinity, -kInfinity};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) highest[e / 2] = max(highest[e / 2], s[n][e]);
      }
      float factor[2];
      bool rescale = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        highest[half] = max(highest[half], shuffle_xor(highest[half], 1));
        highest[half] = max(highest[half], shuffle_xor(highest[half], 2));
        const bool exceeds = highest[half] > reference[half] + kSlack;
        factor[half] = exceeds ? exp2_fast(reference[half] - highest[half]) : 1.0f;
        if (exceeds) reference[half] = highest[half];
        rescale = rescale || exceeds;
      }
      if (rescale) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[n][e] *= factor[e / 2];
        }
        weight[0] *= factor[0];
        weight[1] *= factor[1];
        if (on_v && column > 0)
          scale_bins(bins_v, at.on_v.N, lane % 2 ? factor[1] : factor[0], lane);
      }

      Packed weights;
      const uint32_t dropped =
          p.dropout_p > 0 ? draw_dropped<false>(p, b * p.H + h, own, column, lane) : 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // The reference of a row with nothing but hidden keys so far is -infinity too.
          s[n][e] = s[n][e] == -kInfinity ? 0.0f : exp2_fast(s[n][e] - reference[e / 2]);
          weight[e / 2] += s[n][e];
          if (dropped >> (n * 4 + e) & 1) s[n][e] = 0;
        }
        weights[n][0] = pack<T>(s[n][0], s[n][1]);
        weights[n][1] = pack<T>(s[n][2], s[n][3]);
      }
      multiply<T, D>(out, weights, tile_v, lane);
      if (on_v) add_to_bins<T>(bins_v, p.on_v, weights, own, column, p.L, lane);
    }

    if (!idle) {
      float share[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[half] += shuffle_xor(weight[half], 1);
        weight[half] += shuffle_xor(weight[half], 2);
        share[half] = weight[half] > 0 ? 1 / weight[half] : 0.0f;
        const int row = own + lane / 4 + half * 8;
        if (lane % 4 == 0 && row < p.L) {
          const float lse = (reference[half] + log2_fast(weight[half])) * kLn2;
          p.lse[token_of(p, b, h, row)] = weight[half] > 0 ? lse : kInfinity;
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] *= share[e / 2];
      }
      if (on_v) {
        collect_bins(sums_v, at.on_v, bins_v, share, lane);
        multiply_table<T, D>(out, sums_v, at.on_v, lane);
      }
      store_own<T, D>(p.out, b, h, own, p.L, out, {at.keep, at.keep}, lane);
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
