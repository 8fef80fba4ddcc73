// What these kernels are compiled for. Nothing that a model never changes is tested at run time:
// NVRTC gets one value for each macro, from compile_options of ops/fused_kernels.py.
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

namespace irpe {

constexpr bool kBFloat16 = BFLOAT16;  // else IEEE half
constexpr int kHeadDim = HEAD_DIM;    // a multiple of 8
constexpr int kGridH = GRID_H, kGridW = GRID_W;
constexpr int kPrefix =
    NUM_PREFIX_TOKENS;  // class token, distillation token, registers; they come first
constexpr int kPatches = kGridH * kGridW, kTokens = kPrefix + kPatches;

// Relative position on queries, keys or values. The bucket of two tokens, of which the first one
// has the lookup: b(u, w) = M[row_class(yu - yw)][column_class(xu - xw)].
struct Rpe {
  int row_classes;  // 0: none
  int slots;        // column classes and, in the last one, the bucket of prefix tokens; 8 or 16
  bool bias;        // the term does not depend on q
  bool runs;        // each class of rows is one run of offsets

  constexpr explicit operator bool() const { return row_classes > 0; }
  constexpr int entries() const { return row_classes * slots; }
};
// Where lookups belong to the tokens of the ring (ring_lookup.cuh), the classes change places:
// row_classes counts those of columns, slots hold those of rows.
constexpr Rpe kRpeQ = {RPE_Q_ROWS, RPE_Q_SLOTS, RPE_Q_BIAS, RPE_Q_RUNS};
constexpr Rpe kRpeK = {RPE_K_ROWS, RPE_K_SLOTS, RPE_K_BIAS, RPE_K_RUNS};
constexpr Rpe kRpeV = {RPE_V_ROWS, RPE_V_SLOTS, false, RPE_V_RUNS};
// The terms on keys and on values have the same classes, so what is constant is loaded once.
constexpr bool kSameClasses = SAME_CLASSES;
constexpr bool kMask = KEY_PADDING_MASK, kDropout = DROPOUT;

// The block.
constexpr int kWarp = 32;
constexpr int kWarps = WARPS;
constexpr int kThreads = kWarps * kWarp;
constexpr int kStripsPerWarp = STRIPS;  // that a warp works on at a time
constexpr int kStages = STAGES;         // of the ring of chunks
constexpr int kStepTiles = STEP_TILES;  // tiles of 8 keys in a step of the online softmax
constexpr bool kPrefetchQ = PREFETCH_Q;

// f.template operator()<n>() for n from 0 on.
template <int count, int n = 0, typename F>
__device__ __forceinline__ void for_each(F&& f) {
  if constexpr (n < count) {
    f.template operator()<n>();
    for_each<count, n + 1>(f);
  }
}
template <bool value_>
struct Bool {
  static constexpr bool value = value_;
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr int min(int a, int b) { return a < b ? a : b; }

// Rows of shared memory: with an odd number of 16-byte words, 8 rows of ldmatrix lie in all banks.
constexpr int pitch_of(int bytes) { return bytes / 16 % 2 ? bytes : bytes + 16; }
constexpr int kPitch = pitch_of(kHeadDim * 2);

// ---- strips: the tokens that belong to a warp ----
//
// A strip of 16 tokens is two groups of 8; a group has tokens of one grid column, whose columns'
// one-hots are then the same. Free rows at the end of a column take the prefix tokens.
constexpr int kColumnGroups = ceil_div(kGridH, 8);
constexpr bool kTwoColumns = kColumnGroups % 2;  // the groups of a strip may have two grid columns
constexpr int kFreeRows = kColumnGroups * 8 - kGridH;
constexpr int kPatchGroups = kGridW * kColumnGroups;
constexpr int kGroups = kPatchGroups + ceil_div(max(0, kPrefix - kGridW * kFreeRows), 8);
constexpr int kStrips = ceil_div(kGroups, 2);
constexpr int kItems =
    ceil_div(kStrips, kStripsPerWarp);  // of an image: what a warp takes at a time
constexpr int kPasses = ceil_div(kItems, kWarps);

// ---- the ring: patches row by row, then the prefix tokens ----
//
// They come in chunks of whole grid rows, so that the places of row ends are known at compile time.
// Rows of a width that makes no chunks of whole tiles are padded.
constexpr int kRingWidth = RING_WIDTH;
constexpr int kTileRows = 7 / kRingWidth + 2;  // grid rows that a tile of 8 tokens may touch
constexpr int kRingPatches = kGridH * kRingWidth;
constexpr int chunk_rows(int target) {
  int step = 2;
  while (step * kRingWidth % 16) step += 2;
  int rows = step;
  while ((rows + step) * kRingWidth <= target) rows += step;
  return min(rows, kGridH);
}
constexpr int kChunkRows = chunk_rows(CHUNK_KEYS), kChunkKeys = kChunkRows * kRingWidth;
constexpr int kChunks = ceil_div(kGridH, kChunkRows);
constexpr int kLastRows = kGridH - (kChunks - 1) * kChunkRows;
constexpr int kLastKeys = kLastRows * kRingWidth + kPrefix;
constexpr int kChunkCapacity = round_up(max(kChunks > 1 ? kChunkKeys : 0, kLastKeys), 16);

// Tiles of 8 places of a chunk of so many grid rows. They are taken by twos; of an odd number the
// last one has instructions of its own, half as long.
template <int rows, bool last>
constexpr int kTilesOf = ceil_div(rows * kRingWidth + (last ? kPrefix : 0), 8);

// The token at a position, -1 if there is none; and a token's position.
__device__ __forceinline__ int token_at(int position) {
  if (position >= kRingPatches)
    return position - kRingPatches < kPrefix ? position - kRingPatches : -1;
  if constexpr (kRingWidth == kGridW) return kPrefix + position;
  const int y = position / kRingWidth, x = position % kRingWidth;
  return x < kGridW ? kPrefix + y * kGridW + x : -1;
}
__device__ __forceinline__ int position_of(int token) {
  if (token < kPrefix) return kRingPatches + token;
  return (token - kPrefix) / kGridW * kRingWidth + (token - kPrefix) % kGridW;
}
// Whether a place in a chunk of so many grid rows holds a token.
template <int rows, bool last>
__host__ __device__ constexpr bool has_token(int place) {
  if (place < rows * kRingWidth) return place % kRingWidth < kGridW;
  return last && place < rows * kRingWidth + kPrefix;
}

struct Matrix {  // (B, H, L, D), D numbers next to each other
  void* data;
  int32_t stride_b, stride_h, stride_l;  // in numbers; an image's lie within 2^31
};
struct Table {  // (H or 1, row_classes * slots, D); of a bias (H or 1, row_classes * slots)
  const void* data;
  int64_t stride_h;
  const uint8_t* row_class;     // by yu - yw + kGridH - 1
  const uint8_t* column_class;  // by xu - xw + kGridW - 1
};
struct Params {
  Matrix q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float *lse, *delta;  // (B, H, L)
  // Bucket sums for a backward, (B, L, H, row_classes * slots); null if the forward need not keep
  // them.
  void *sums_q, *sums_k, *sums_v;
  Table rpe_q, rpe_k, rpe_v;
  const uint8_t* key_padding_mask;  // (B, L), not zero where a key must not be attended to
  const uint64_t* seed;             // of the dropout, one number
  int32_t B, H;
  float softmax_scale, softmax_scale_log2, dropout_scale;
  uint32_t dropout_threshold;  // a number is dropped whose 16 bits are below
};

// False, which ptxas cannot know: a return on it ends a basic block, and no instruction is moved
// over that. Else ptxas begins so many steps at once that registers spill. Each `n` is a condition
// of its own: one that was tested before would end nothing.
__device__ __forceinline__ bool never(const Params& p, int n) { return p.B == -1 - n; }

}  // namespace irpe
