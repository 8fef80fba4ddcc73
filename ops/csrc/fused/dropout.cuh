// Which attention weights are dropped: the same in every kernel, by a counter-based generator.
#pragma once

#include "config.cuh"

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

// Zeroes what is dropped in a 16 x 16 tile of weights, the left operand of a product: `row` is the
// number of the lane's first row among all strips' rows, `step` that of the tile among an image's.
// A word of the generator decides on one word of the operand, 16 bits on each number.
__device__ __forceinline__ void drop(uint32_t (&a)[4], const Params& p, int bh, int row, int step,
                                     int lane) {
  const Philox draw(*p.seed, row, step * 4 + lane % 4, bh);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    if ((draw.words[n] & 0xffff) < p.dropout_threshold) a[n] &= 0xffff0000;
    if (draw.words[n] >> 16 < p.dropout_threshold) a[n] &= 0xffff;
  }
}

}  // namespace irpe
