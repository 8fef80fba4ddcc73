// Which attention weights are dropped: the same in every kernel, by a counter-based generator.
#pragma once

#include "strips.cuh"

namespace irpe {

// Philox4x32-10 (Salmon et al., SC 2011).
struct Philox {
  uint32_t words[4];

  __device__ Philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t counter[4] = {c0, c1, c2, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
      counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0];
      counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1];
      counter[1] = static_cast<uint32_t>(b), counter[3] = static_cast<uint32_t>(a);
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = counter[n];
  }
};

// What is dropped of a 16 x 16 tile of weights: `row` is the number of the lane's first row among
// all strips' rows, `step` that of the tile among an image's. A word decides on one word of the
// tile as the left operand of a product, 16 bits on each number.
struct Dropped {
  Philox draw;
  uint32_t threshold;

  __device__ Dropped(const Params& p, int bh, int row, int step, int lane)
      : draw(*p.seed, row, step * 4 + lane % 4, bh), threshold(p.dropout_threshold) {}
  __device__ bool operator()(int word, int parity) const {
    return (parity ? draw.words[word] >> 16 : draw.words[word] & 0xffff) < threshold;
  }
  __device__ void apply(uint32_t (&a)[4]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((*this)(n, 0)) a[n] &= 0xffff0000;
      if ((*this)(n, 1)) a[n] &= 0xffff;
    }
  }
};

// The same of one weight, for a kernel whose tiles lie otherwise; `key` is a position of the ring.
__device__ __forceinline__ bool is_dropped(const Params& p, int bh, int query, int key) {
  int group, row;
  if (query >= kPrefix) {
    const int y = (query - kPrefix) / kGridW, x = (query - kPrefix) % kGridW;
    group = x * kColumnGroups + y / 8, row = y % 8;
  } else if (query < kGridW * kFreeRows) {
    const int column = query / max(kFreeRows, 1);
    group = (column + 1) * kColumnGroups - 1, row = 8 - kFreeRows + query - column * kFreeRows;
  } else {
    const int n = query - kGridW * kFreeRows;
    group = kPatchGroups + n / 8, row = n % 8;
  }
  const Dropped tile(p, bh, group / 2 * 8 + row, key / 16, key % 8 / 2);
  const int place = key % 16 / 8 * 2 + group % 2;
  bool dropped = false;
#pragma unroll
  for (int word = 0; word < 4; ++word) {  // an array with a variable index would leave registers
    if (word == place) dropped = key % 2 ? tile(word, 1) : tile(word, 0);
  }
  return dropped;
}

}  // namespace irpe
