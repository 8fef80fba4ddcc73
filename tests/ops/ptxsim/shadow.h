// What shared memory's checks remember of every two bytes (a cell).
#pragma once

#include <cstdint>
#include <vector>

#include "clocks.h"

namespace ptxsim {

// Executions of one instruction by one warp at one time; numbered, 0 is none.
struct Access {
  Time time;
  uint32_t agents;  // the agent of lane 0; that of lane n is n more
  int pc;
};

enum CellState : uint8_t { kUnwritten, kWritten, kUnderWay, kMbarrier };

constexpr uint32_t kRow = 8;  // cells: a row of ldmatrix

struct SharedShadow {
  std::vector<Access> accesses;
  std::vector<uint32_t> write;        // by cell: the last write
  std::vector<uint8_t> writer, state; // its lane; a CellState
  std::vector<uint32_t> readers;      // warps that have read since
  // By warp, then by cell: the last read since, and the lanes that read.
  std::vector<std::vector<uint32_t>> read, lanes;

  void reset(uint32_t bytes, size_t warps) {
    const size_t cells = (bytes / 2 + kRow) / kRow * kRow;
    accesses.assign(1, Access{0, 0, -1});
    write.assign(cells, 0), writer.assign(cells, 0), state.assign(cells, kUnwritten);
    readers.assign(cells, 0);
    read.resize(warps), lanes.resize(warps);
    for (auto& r : read) r.resize(cells);
    for (auto& l : lanes) l.resize(cells);
  }
};

}  // namespace ptxsim
