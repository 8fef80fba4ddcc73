// The backward: scores and weights are computed again from the log-sum-exp, never stored.
//
// With P the weights, P' those that dropout left, scaled up, U = grad_out T_V^T, and b the buckets:
//
//   dP[i,j] = grad_out_i . v_j + U[i, b(i,j)]        delta_i = grad_out_i . out_i
//   dS[i,j] = P[i,j] (dP'[i,j] - delta_i)            dT_K = bucket sums of dS along rows
//   grad_q = scale (dS k + dT_K T_K^T)               dT_Q = bucket sums of dS along columns
//   grad_k = scale (dS^T q + dT_Q T_Q^T)             grad of T_K = scale q^T dT_K
//   grad_v = P'^T grad_out                           grad of T_V = (bucket sums of P')^T grad_out
//
// A pass over queries has what is summed along rows, a pass over keys what is summed along columns:
// nothing is added up by more than one block, and no sum depends on timing. That S and dP are
// computed twice costs 2 matrix products in 7.

#include "attention.cuh"
#include "dropout.cuh"

namespace irpe::cuda {
namespace {

// grad_table (+)= factor sums^T x over the block's own tokens.
template <typename T, int D>
__device__ void add_table_grad(float* grad_table, const Place& at, const T* x, int tokens,
                               float factor, bool first, int warps, int lane) {
  constexpr int kParts = D / 16;
  for (int n = static_cast<int>(threadIdx.x) / kWarp; n < at.padded / 16 * kParts; n += warps) {
    const int bucket = n / kParts * 16, d = n % kParts * 16;
    float grad[2][4] = {};
    for (int row = 0; row < tokens; row += 16) {
      uint32_t a[4], b[2][2];
      load_a_turned(a, shared_at<T>(at.lookups) + row * at.pitch + bucket, at.pitch, lane);
      load_b_turned(b, x + row * kPitch<D> + d, kPitch<D>, lane);
      multiply_add<T>(grad[0], a, b[0]);
      multiply_add<T>(grad[1], a, b[1]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float* to = grad_table + (bucket + lane / 4 + e / 2 % 2 * 8) * D + d + e / 4 * 8 +
                  lane % 4 * 2 + e % 2;
      *to = grad[e / 4][e % 4] * factor + (first ? 0.0f : *to);
    }
  }
}

// grad_bias (+)= sums over the block's own tokens.
template <typename T>
__device__ void add_bias_grad(float* grad_bias, const Place& at, int tokens, bool first,
                              int threads) {
  for (int n = static_cast<int>(threadIdx.x); n < at.padded; n += threads) {
    float grad = first ? 0.0f : grad_bias[n];
    const T* sums = shared_at<T>(at.lookups) + n;
    for (int row = 0; row < tokens; ++row) grad += to_float(sums[row * at.pitch]);
    grad_bias[n] = grad;
  }
}

template <typename T, int D, bool keys>
__global__ void __launch_bounds__(most_warps(keys ? Pass::kKeys : Pass::kQueries) * kWarp)
    backward_kernel(const __grid_constant__ Attention p, const __grid_constant__ Layout at) {
  constexpr int M = strips(keys ? Pass::kKeys : Pass::kQueries);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, threads = at.warps * kWarp;
  const int h = static_cast<int>(blockIdx.y);
  const int own_block = static_cast<int>(blockIdx.x) * at.warps * M * kStrip;
  const int own = own_block + warp * M * kStrip;
  const bool idle = own >= p.L;

  // Whose lookups belong to the tokens of this warp: scores and, in the pass over queries, values.
  const Target& on_own = keys ? p.on_q : p.on_k;
  const Target& on_other = keys ? p.on_k : p.on_q;
  const Place& at_own = keys ? at.on_q : at.on_k;
  const Place& at_other = keys ? at.on_k : at.on_q;
  const bool has_own = on_own.num_terms, has_other = on_other.num_terms;
  const bool on_v = p.on_v.num_terms;
  if (has_own) load_table<T, D>(on_own, at_own, h, threads);
  if (has_other) load_table<T, D>(on_other, at_other, h, threads);
  if (on_v) load_table<T, D>(p.on_v, at.on_v, h, threads);
  __syncthreads();

  T* lookups_own = shared_at<T>(at_own.lookups) + warp * M * kStrip * at_own.pitch;
  T* lookups_other = shared_at<T>(at_other.lookups);
  T* lookups_v = shared_at<T>(at.on_v.lookups) + (keys ? 0 : warp * M * kStrip * at.on_v.pitch);
  float* bins_own = shared_at<float>(at_own.bins) + warp * M * at_own.N * kWarp;
  float* bins_v = shared_at<float>(at.on_v.bins) + warp * M * at.on_v.N * kWarp;
  T* tiles = shared_at<T>(at.tiles);

  for (int b = static_cast<int>(blockIdx.z); b < p.B; b += at.groups) {
    // x and z are this warp's, y and w the others': scores are x y^T, gradients of weights z w^T.
    const Rows &x_rows = keys ? p.k : p.q, &y_rows = keys ? p.q : p.k;
    const Rows &z_rows = keys ? p.v : p.grad_out, &w_rows = keys ? p.grad_out : p.v;
    const auto start = [&](int stage, int first) {
      T* tile = tiles + stage * 2 * kColumns * kPitch<D>;
      start_copy<T, D>(tile, y_rows, b, h, first, p.L, kColumns, threads);
      start_copy<T, D>(tile + kColumns * kPitch<D>, w_rows, b, h, first, p.L, kColumns, threads);
      copies_commit();
      if constexpr (keys) {
        float* columns = shared_at<float>(at.columns) + stage * 2 * kColumns;
        for (int n = static_cast<int>(threadIdx.x); n < kColumns; n += threads) {
          const bool inside = first + n < p.L;
          const int64_t token = token_of(p, b, h, first + n);
          columns[n] = inside ? p.lse[token] * kLog2E : kInfinity;
          columns[kColumns + n] = inside ? p.delta[token] : 0.0f;
        }
      }
    };
    start(0, 0);

    uint32_t x[M][D / 16][4], z[M][D / 16][4];
    load_own<T, D>(x, x_rows, b, h, own, p.L, lane);
    load_own<T, D>(z, z_rows, b, h, own, p.L, lane);
    float lse[M][2], delta[M][2];
    if constexpr (!keys) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        row_products<T, D>(delta[m], z[m], p.out, b, h, own + m * kStrip, p.L, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = own + m * kStrip + lane / 4 + half * 8;
          const int64_t token = token_of(p, b, h, row);
          lse[m][half] = row < p.L ? p.lse[token] * kLog2E : kInfinity;
          if (lane % 4 == 0 && row < p.L) p.delta[token] = delta[m][half];
        }
      }
    }
    if (!idle) {
      if (has_own) {
        look_up_own<T, D>(lookups_own, at_own, x, at.unit, lane);
        clear_bins(bins_own, M * at_own.N, lane);
      }
      if (on_v && !keys) {
        look_up_own<T, D>(lookups_v, at.on_v, z, 1.0f, lane);
        clear_bins(bins_v, M * at.on_v.N, lane);
      }
    }
    float grad_x[M][D / 8][4] = {}, grad_z[M][D / 8][4] = {};  // of z in the pass over keys alone

#pragma unroll 1
    for (int column = 0; column < p.L; column += kColumns) {
      const int stage = column / kColumns % 2;
      copies_wait<0>();
      __syncthreads();  // the tile is there, and nobody reads the one before
      if (column + kColumns < p.L) start(stage ^ 1, column + kColumns);
      const T* y = tiles + stage * 2 * kColumns * kPitch<D>;
      const T* w = y + kColumns * kPitch<D>;
      if (has_other) look_up_tile<T, D>(at_other, y, at.unit, at.warps, lane);
      if (on_v && keys) look_up_tile<T, D>(at.on_v, w, 1.0f, at.warps, lane);
      if (has_other || (on_v && keys)) __syncthreads();
      if (idle) continue;

      const float* columns = shared_at<float>(at.columns) + stage * 2 * kColumns + lane % 4 * 2;
      float weights[M][kTiles][4] = {};
      multiply_turned<T, D>(weights, x, y, lane);
      uint32_t dropped[M];
      Packed packed[M];  // the weights that dropout left, and then the gradients of the scores
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int row = own + m * kStrip;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) weights[m][n][e] *= at.unit;
        }
        if (has_own) {
          const T* lookups = lookups_own + m * kStrip * at_own.pitch;
          add_lookups<true>(weights[m], on_own, at_own, lookups, row, column, p.L, lane);
        }
        if (has_other) {
          add_lookups<false>(weights[m], on_other, at_other, lookups_other, row, column, p.L, lane);
        }
        if constexpr (!keys) hide_columns(weights[m], p, b, column, lane);

        dropped[m] = p.dropout_p > 0 ? draw_dropped<keys>(p, b * p.H + h, row, column, lane) : 0;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          float kept[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float lse_e = keys ? columns[n * 8 + e % 2] : lse[m][e / 2];
            weights[m][n][e] = exp2_fast(weights[m][n][e] - lse_e);
            kept[e] = dropped[m] >> (n * 4 + e) & 1 ? 0.0f : weights[m][n][e] * at.keep;
          }
          packed[m][n][0] = pack<T>(kept[0], kept[1]);
          packed[m][n][1] = pack<T>(kept[2], kept[3]);
        }
        if (on_v && !keys) {
          float* bins = bins_v + m * at.on_v.N * kWarp;
          add_to_bins<T>(bins, p.on_v, packed[m], row, column, p.L, lane);
        }
      }
      if constexpr (keys) multiply<T, D, M>(grad_z, packed, w, lane);

      float grads[M][kTiles][4] = {};  // of the weights, and then of the scores
      multiply_turned<T, D>(grads, z, w, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int row = own + m * kStrip;
        if (on_v) {
          const T* lookups = lookups_v + (keys ? 0 : m * kStrip * at.on_v.pitch);
          add_lookups<!keys>(grads[m], p.on_v, at.on_v, lookups, row, column, p.L, lane);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float delta_e = keys ? columns[kColumns + n * 8 + e % 2] : delta[m][e / 2];
            const bool drop = dropped[m] >> (n * 4 + e) & 1;
            const float kept = drop ? 0.0f : grads[m][n][e] * at.keep;
            grads[m][n][e] = weights[m][n][e] * (kept - delta_e);
          }
          packed[m][n][0] = pack<T>(grads[m][n][0], grads[m][n][1]);
          packed[m][n][1] = pack<T>(grads[m][n][2], grads[m][n][3]);
        }
        if (has_own) {
          float* bins = bins_own + m * at_own.N * kWarp;
          add_to_bins<T>(bins, on_own, packed[m], row, column, p.L, lane);
        }
      }
      multiply<T, D, M>(grad_x, packed, y, lane);
    }

    if (!idle) {
      // Of a hidden key or one beyond L nothing counts; it was not masked till now.
      float shown[M][2];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float moved[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = own + m * kStrip + lane / 4 + half * 8;
          shown[m][half] = keys && is_hidden(p, b, row) ? 0 : 1;
          moved[half] = !keys && row < p.skip ? 0 : shown[m][half];
        }
        if (has_own) {
          const float* bins = bins_own + m * at_own.N * kWarp;
          collect_bins(lookups_own + m * kStrip * at_own.pitch, at_own, bins, moved, lane);
        }
        if (on_v && !keys) {
          const float* bins = bins_v + m * at.on_v.N * kWarp;
          collect_bins(lookups_v + m * kStrip * at.on_v.pitch, at.on_v, bins, shown[m], lane);
        }
      }
      if (has_own) multiply_table<T, D>(grad_x, lookups_own, at_own, lane);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int row = own + m * kStrip;
        const float scales[2] = {shown[m][0] * p.scale, shown[m][1] * p.scale};
        const Rows& to = keys ? p.grad_k : p.grad_q;
        store_own<T, D>(to, b, h, row, p.L, grad_x[m], scales, lane);
        if constexpr (keys) {
          store_own<T, D>(p.grad_v, b, h, row, p.L, grad_z[m], shown[m], lane);
        }
      }
    }
    __syncthreads();  // the tiles are free, and all bucket sums are there

    const int left = (p.L - own_block + kStrip - 1) / kStrip * kStrip;
    const int tokens = min(at.warps * M * kStrip, left);
    const auto add_grads = [&](const Target& target, const Place& place, const Rows& rows,
                               float factor) {
      start_copy<T, D>(tiles, rows, b, h, own_block, p.L, tokens, threads);
      copies_commit();
      copies_wait<0>();
      __syncthreads();
      const bool is_first = b == static_cast<int>(blockIdx.z);
      const int slot =
          (h * at.groups + static_cast<int>(blockIdx.z)) * at.chunks + static_cast<int>(blockIdx.x);
      const int64_t to = static_cast<int64_t>(slot) * place.padded;
      if (target.grad_table) {
        add_table_grad<T, D>(target.grad_table + to * D, place, tiles, tokens, factor, is_first,
                             at.warps, lane);
      }
      if (target.grad_bias) {
        add_bias_grad<T>(target.grad_bias + to, place, tokens, is_first, threads);
      }
      __syncthreads();
    };
    if (has_own) add_grads(on_own, at_own, x_rows, p.scale);
    if (on_v && !keys) add_grads(p.on_v, at.on_v, z_rows, 1.0f);
  }
}

}  // namespace

int backward(const Attention& p, void* stream) {
  return for_type_and_dim(p, [&](auto type, auto dim) {
    using T = decltype(type);
    const int error = launch_pass(Pass::kQueries, p, backward_kernel<T, dim.value, false>, stream);
    if (error) return error;
    return launch_pass(Pass::kKeys, p, backward_kernel<T, dim.value, true>, stream);
  });
}

bool fits(const Attention& p) {
  for (const Pass pass : {Pass::kForward, Pass::kQueries, Pass::kKeys}) {
    if (plan(pass, p).warps == 0) return p.L == 0;
  }
  return true;
}

Slots slots(const Attention& p) {
  const Layout queries = plan(Pass::kQueries, p), keys = plan(Pass::kKeys, p);
  return {keys.groups * keys.chunks, queries.groups * queries.chunks};
}

}  // namespace irpe::cuda
