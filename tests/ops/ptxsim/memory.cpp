// Loads, stores and atomic operations.
#include "block.h"
#include "values.h"

namespace ptxsim {

// Where the bytes are in this process, after all checks; null if nowhere.
uint8_t* Block::locate(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, int pc,
                       bool write) {
  if (space == PARAM) {
    if (address + bytes <= params_.size()) return const_cast<uint8_t*>(params_.data()) + address;
    find("out of bounds, parameters", pc, -1, w.number * kWarp + lane, std::to_string(address));
    return nullptr;
  }
  if (space == SHARED || (space == GENERIC && address >= kSharedWindow)) {
    const auto at = static_cast<uint32_t>(address & (kSharedWindow - 1));
    if (!shared_access(w, lane, at, bytes, pc, write)) return nullptr;
    return shared_.data() + (at - kSharedBase);
  }
  if (!global_access(w, lane, address, bytes, pc, write)) return nullptr;
  return reinterpret_cast<uint8_t*>(address);
}

static void count_access(Count& count, Space space, const Lanes& address, uint32_t mask,
                         uint32_t bytes) {
  if (space == PARAM) return;
  if (space == SHARED) {
    uint64_t ideal;
    count.wavefronts += wavefronts(address, mask, bytes, ideal);
    count.ideal += ideal;
    return;
  }
  count.sectors += sectors(address, mask, bytes);
  count.bytes += uint64_t{bytes} * static_cast<uint64_t>(__builtin_popcount(mask));
}

void Block::load_store(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  const auto element = static_cast<uint32_t>(size_of(i.type));
  const uint32_t bytes = element * i.vector;
  const bool write = i.op == ST;
  Lanes address, value[4];
  fetch_address(w, i.in[0], address);
  for (size_t n = 0; write && n < i.vector; ++n) fetch(w, i.in[1 + n], value[n]);
  count_access(result_.counts[static_cast<size_t>(pc)], i.space, address, mask, bytes);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    uint8_t* at = locate(w, lane, i.space, address[l], bytes, pc, write);
    for (size_t n = 0; n < i.vector; ++n) {
      if (write) {
        if (at) std::memcpy(at + n * element, &value[n][l], element);
        continue;
      }
      uint64_t x = 0xA5A5A5A5A5A5A5A5;
      if (at) {
        x = 0;
        std::memcpy(&x, at + n * element, element);
      }
      value[n][l] = widen(x, i.type);
    }
  }
  for (size_t n = 0; !write && n < i.vector; ++n) store(w, i.to[n], value[n], mask);
}

// Atomic operations do not race with each other; they are taken as relaxed, and order nothing.
void Block::atomic(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  const auto bytes = static_cast<uint32_t>(size_of(i.type));
  Lanes address, value, other, old{};
  fetch_address(w, i.in[0], address);
  fetch(w, i.in[1], value);
  if (i.in.size() > 2) fetch(w, i.in[2], other);
  count_access(result_.counts[static_cast<size_t>(pc)], i.space, address, mask, bytes);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    // Reads too: the place has to hold a value, though other atomic writes may have made it.
    uint8_t* at = locate(w, lane, i.space, address[l], bytes, pc, true);
    if (!at) continue;
    uint64_t x = 0;
    std::memcpy(&x, at, bytes);
    old[l] = widen(x, i.type);
    uint64_t next = value[l];
    if (i.mode == RED_CAS) {
      next = old[l] == widen(value[l], i.type) ? other[l] : old[l];
    } else if (i.mode != RED_EXCH) {
      next = reduce_two(i, old[l], value[l]);
    }
    std::memcpy(at, &next, bytes);
  }
  store(w, i.to[0], old, mask);
}

}  // namespace ptxsim
