// Global memory: allocations, and what its checks remember.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "clocks.h"

namespace ptxsim {

// The last accesses of 16 bytes as a whole (a line), or of 2 bytes (a cell), within a launch.
struct Touch {
  uint32_t launch = 0;
  int32_t writer_block = -1, reader_block = -1;  // -1 none, -2 several
  int32_t write_pc = -1, read_pc = -1;
  Time write_time = 0;
  Time first_read = 0, last_read = 0;  // since the last write
  uint32_t readers = 0;                // warps of the block that read since
  uint32_t last_lanes = 0;             // lanes of the warp that read last
  int16_t writer = -1;                 // thread
  int8_t last_reader = -1;             // warp
  bool written = false;                // ever
};

struct Allocation {
  uint64_t base, bytes;
  std::vector<Touch> lines, cells;
  std::vector<uint32_t> cells_used;  // by line: the launch that last touched single cells
};

Allocation* allocation_of(uint64_t address, uint64_t bytes);
Allocation* allocation_before(uint64_t address);  // the one that starts there or below
std::mutex& global_lock();
uint32_t next_launch();
uint32_t this_launch();

}  // namespace ptxsim
