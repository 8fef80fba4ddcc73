// Runs a kernel of PTX, warp by warp, and watches every access to memory: what a caller sees.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "ptx.h"

namespace ptxsim {

struct Dim {
  uint32_t x, y, z;
};

// Of one instruction of the text, over all warps.
struct Count {
  uint64_t warps = 0, lanes = 0;       // executions by warps; by threads
  uint64_t wavefronts = 0, ideal = 0;  // shared memory: clocks; without bank conflicts
  uint64_t sectors = 0, bytes = 0;     // global memory: 32-byte sectors; bytes asked for
};

struct Finding {
  uint64_t count = 0;
  std::string example;
};

// A finding is a kind, and the instructions of both accesses (the second -1 if one stands alone).
struct Key {
  std::string kind;
  int pc, other;
  bool operator<(const Key& b) const {
    return std::tie(kind, pc, other) < std::tie(b.kind, b.pc, b.other);
  }
};

struct Result {
  std::vector<Count> counts;  // by instruction
  std::map<Key, Finding> findings;
  uint64_t launches = 0, blocks = 0, warps = 0;
  bool trapped = false;
};

enum Order { kFirst, kLast, kRandom };

struct Options {
  Order order = kFirst;   // of warps, and of asynchronous copies
  uint64_t seed = 1;
  bool truncate = false;  // mma rounds sums toward zero every 8 products, much as hardware does
  bool check = true;      // races, uninitialised reads
};

// Global memory: every buffer that a kernel may touch.
constexpr uint8_t kPoison = 0xA5;  // what fresh allocations are filled with
void add_allocation(const void* base, uint64_t bytes);
void remove_allocation(const void* base);

// Runs a grid of blocks of `threads` threads and adds to `result`.
void run_grid(const Kernel& kernel, Dim grid, uint32_t threads, uint32_t dynamic_shared,
              const std::vector<uint8_t>& params, const Options& options, Result& result);

std::string place(const Kernel& kernel, int pc);  // "file:line < file:line ...", outermost last

}  // namespace ptxsim
