// How a pass of attention is divided into blocks, and what lies where in a block's shared memory.
#pragma once

#include "attention.h"
#include "primitives.cuh"

namespace irpe::cuda {

constexpr int kWarp = 32;
constexpr int kStrip = 16;    // tokens
constexpr int kColumns = 32;  // other tokens in a tile
constexpr float kLog2E = 1.4426950408889634f;

// Where a target lies in the block's shared memory, in bytes.
struct Place {
  int table;    // (padded, kPitch) numbers; zero for a bias
  int bias;     // (padded) floats in units of log2; zero for a table
  int lookups;  // (tokens, pitch) numbers, and in the end the owners' bucket sums
  int bins;     // (strips, N, 32 lanes) floats
  int N, padded, pitch;
};

struct Layout {
  int warps, chunks, groups;  // of a block; of tokens; of images
  int blocks;                 // of a multiprocessor at a time
  int tiles;                  // (2 stages, 2, kColumns, kPitch) numbers; in the end the own tokens
  int columns;                // (2 stages, 2, kColumns) floats, in the pass over keys
  Place on_q, on_k, on_v;
  int bytes;
  float unit;  // scores in powers of two: scale log2(e)
  float keep;  // what weights that dropout leaves are multiplied with
};

// A backward is the pass over queries, then the pass over keys.
enum class Pass { kForward, kQueries, kKeys };

__host__ __device__ constexpr bool owned_by_keys(Pass pass) { return pass == Pass::kKeys; }

// How many strips a warp owns; and of how many warps at a time a multiprocessor has the registers:
// 255 for each thread, or 168, where two strips would not do with 255.
__host__ __device__ constexpr int strips(Pass pass) { return owned_by_keys(pass) ? 1 : 2; }
__host__ __device__ constexpr int most_warps(Pass pass) { return owned_by_keys(pass) ? 12 : 8; }

inline Place place(const Target& target, int D, int tokens, int binned_strips, int& bytes) {
  const auto take = [&bytes](int count) {
    const int begin = bytes;
    bytes += (count + 15) / 16 * 16;
    return begin;
  };
  Place at = {};
  if (target.num_terms == 0) return at;
  for (int t = 0; t < target.num_terms; ++t) at.N += target.terms[t].N;
  at.padded = padded_buckets(target);
  at.pitch = at.padded + 8;
  at.table = take(at.padded * (D + 8) * 2);
  at.bias = take(at.padded * 4);
  at.lookups = take(tokens * at.pitch * 2);
  at.bins = take(binned_strips * at.N * kWarp * 4);
  return at;
}

inline Layout layout_of(Pass pass, const Attention& p, int warps) {
  const bool keys = owned_by_keys(pass), backward = pass != Pass::kForward;
  Layout at = {};
  at.warps = warps;
  at.unit = p.scale * kLog2E;
  at.keep = 1 / (1 - p.dropout_p);
  const int own_strips = warps * strips(pass), own = own_strips * kStrip;
  const int rows = max(2 * 2 * kColumns, backward ? own : 0);
  at.bytes = rows * (p.D + 8) * 2;
  at.columns = at.bytes;
  if (keys) at.bytes += 2 * 2 * kColumns * 4;
  const int bins = backward ? own_strips : 0;
  at.on_q = place(p.on_q, p.D, keys ? own : kColumns, keys ? bins : 0, at.bytes);
  at.on_k = place(p.on_k, p.D, keys ? kColumns : own, keys ? 0 : bins, at.bytes);
  at.on_v = place(p.on_v, p.D, keys ? kColumns : own, keys ? 0 : own_strips, at.bytes);
  return at;
}

// The size of a block that keeps most warps of a multiprocessor busy, rather in two blocks than in
// one, so that one computes while the other waits for its tile; of equals the largest, which reads
// the other tokens least often. Less than four strips, if four fit, would wait for the L2
// cache: a strip takes about 1000 clocks for what 2000 clocks bring. No warps if not even one fits.
// All of this is by count, not timed yet.
inline Layout plan(Pass pass, const Attention& p, const Device& gpu = device()) {
  constexpr int kReserved = 1024;  // bytes that the GPU keeps of a block's shared memory
  constexpr int kFewestStrips = 4;
  const int rows = strips(pass) * kStrip, tiles = (p.L + rows - 1) / rows;
  Layout best = {};
  float best_busy = 0;
  for (int chunks = 1; chunks <= tiles; ++chunks) {
    const int warps = (tiles + chunks - 1) / chunks;
    Layout at = layout_of(pass, p, warps);
    if (warps > most_warps(pass) || at.bytes > gpu.block_shared) continue;
    if (best.warps && warps * strips(pass) < kFewestStrips) break;
    at.chunks = chunks;
    at.blocks = min(most_warps(pass) / warps, gpu.processor_shared / (at.bytes + kReserved));
    const float overlap = at.blocks > 1 ? 1.0f : 0.75f;
    const float busy = static_cast<float>(tiles) / chunks * at.blocks * overlap;
    if (busy > best_busy * 1.01f) best = at, best_busy = busy;
  }
  if (best.warps == 0) return best;
  const int resident = gpu.processors * best.blocks;
  const int groups = max(1, min(p.B, resident / max(1, best.chunks * p.H)));
  const int rounds = max(1, (p.B + groups - 1) / groups);
  best.groups = (p.B + rounds - 1) / rounds;
  return best;
}

template <int value_>
struct Dim {
  static constexpr int value = value_;
};

// call(a number of the type, Dim<D>).
template <typename Call>
auto for_type_and_dim(const Attention& p, Call call) {
  const auto for_dim = [&](auto type) {
    return p.D == 64 ? call(type, Dim<64>{}) : call(type, Dim<32>{});
  };
  return p.type == Type::kFloat16 ? for_dim(f16{}) : for_dim(bf16{});
}

template <typename Kernel>
int launch_pass(Pass pass, const Attention& p, Kernel kernel, void* stream) {
  if (p.B == 0 || p.H == 0 || p.L == 0) return 0;
  const Layout at = plan(pass, p);
  const dim3 grid(at.chunks, p.H, at.groups);
  return launch(kernel, grid, at.warps * kWarp, at.bytes, stream, p, at);
}

}  // namespace irpe::cuda
