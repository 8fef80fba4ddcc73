// What an access costs by a model of the hardware: clocks of shared memory, sectors of global.
#include <algorithm>

#include "block.h"

namespace ptxsim {

// Do all lanes of the group use banks of their own? (The usual case, in few instructions.)
static bool no_conflict(const Lanes& addresses, uint32_t mask, uint32_t bytes, size_t first,
                        size_t lanes) {
  if (bytes < 4 || mask != kAllLanes) return false;
  uint32_t places = 0;
  const uint64_t count = 128 / bytes;
  for (size_t l = first; l < first + lanes; ++l) {
    if (addresses[l] % bytes) return false;
    places |= 1u << (addresses[l] / bytes % count);
  }
  return static_cast<size_t>(__builtin_popcount(places)) == lanes;
}

// For every group of lanes that moves at most 128 bytes, the most different words of 4 bytes that
// any of the 32 banks has to give.
uint64_t wavefronts(const Lanes& addresses, uint32_t mask, uint32_t bytes, uint64_t& ideal) {
  const size_t lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint64_t total = 0;
  ideal = 0;
  for (size_t first = 0; first < kWarp; first += lanes) {
    if (no_conflict(addresses, mask, bytes, first, lanes)) {
      ++total, ++ideal;
      continue;
    }
    uint32_t words[32][32];  // by bank
    uint32_t counts[32] = {}, most = 0;
    for (size_t l = first; l < first + lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      const auto last = static_cast<uint32_t>((addresses[l] + bytes - 1) / 4);
      for (auto word = static_cast<uint32_t>(addresses[l] / 4); word <= last; ++word) {
        const uint32_t bank = word % 32;
        uint32_t n = 0;
        while (n < counts[bank] && words[bank][n] != word) ++n;
        if (n == counts[bank] && n < 32) words[bank][counts[bank]++] = word;
        most = std::max(most, counts[bank]);
      }
    }
    total += most;
    ideal += most > 0;
  }
  return total;
}

uint64_t sectors(const Lanes& addresses, uint32_t mask, uint32_t bytes) {
  uint64_t all[kWarp * 2];
  size_t count = 0;
  for (size_t l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    const uint64_t first = addresses[l] / 32, last = (addresses[l] + bytes - 1) / 32;
    for (uint64_t s = first; s <= last && count < kWarp * 2; ++s) {
      if (count == 0 || all[count - 1] != s) all[count++] = s;
    }
  }
  std::sort(all, all + count);
  return static_cast<uint64_t>(std::unique(all, all + count) - all);
}

}  // namespace ptxsim
