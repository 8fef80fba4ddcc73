// Shared memory: bounds, alignment, initialisation, races; all by cells of two bytes.
#include <cstdio>
#include <cstring>

#include "block.h"

namespace ptxsim {

void Block::find(const char* kind, int pc, int other, int thread, const std::string& more) {
  Finding& f = result_.findings[{kind, pc, other}];
  if (f.count++ != 0) return;
  char text[160];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread %d: ", index_.x, index_.y, index_.z,
                thread);
  f.example = text + more;
}

void Block::race(const char* what, int pc, int other, int thread, uint32_t agent,
                 uint64_t address) {
  char text[160];
  const bool is_thread = agent < warp_count() * kWarp;
  std::snprintf(text, sizeof text, "no barrier after %s %u, address 0x%lx",
                is_thread ? "thread" : "an asynchronous copy of", is_thread ? agent : 0u,
                static_cast<unsigned long>(address));
  find(what, pc, other, thread, text);
}

// The number of this warp's accesses by that instruction, since its latest release.
uint32_t Block::access_of(Warp& w, int pc) {
  auto& [time, number] = w.access_at[static_cast<size_t>(pc)];
  if (time != w.now) {
    time = w.now;
    number = static_cast<uint32_t>(shadow_.accesses.size());
    shadow_.accesses.push_back({w.now, static_cast<uint32_t>(w.number * kWarp), pc});
  }
  return number;
}

bool Block::in_shared(Warp& w, int lane, uint32_t address, uint32_t bytes, int pc, bool write) {
  const int thread = w.number * kWarp + lane;
  char text[120];
  if (address < kSharedBase || uint64_t{address} + bytes > uint64_t{kSharedBase} + shared_bytes_) {
    std::snprintf(text, sizeof text, "%u bytes at %ld of %u", bytes,
                  static_cast<long>(address) - kSharedBase, shared_bytes_);
    find(write ? "out of bounds, shared write" : "out of bounds, shared read", pc, -1, thread,
         text);
    return false;
  }
  if (address % bytes) {
    std::snprintf(text, sizeof text, "%u bytes at %u", bytes, address - kSharedBase);
    find("misaligned, shared", pc, -1, thread, text);
  }
  return true;
}

bool Block::shared_access(Warp& w, int lane, uint32_t address, uint32_t bytes, int pc,
                          bool write) {
  if (!in_shared(w, lane, address, bytes, pc, write)) return false;
  if (!options_.check) return true;
  const uint32_t first = (address - kSharedBase) / 2;
  const uint32_t end = (address - kSharedBase + bytes + 1) / 2, access = access_of(w, pc);
  for (uint32_t cell = first; cell < end; ++cell) {
    if (shadow_.state[cell] != kWritten) check_state(w, lane, cell, pc, write);
    if (!write) {
      read_cell(w, lane, cell, pc);
      note_read(w, 1u << lane, cell, access);
    } else if (bytes > 1) {
      write_cell(w, lane, cell, access, pc);
    } else {
      shadow_.state[cell] = kWritten;  // the cell is shared with a neighbour: no races
    }
  }
  return true;
}

// A cell that does not hold a value: says so, unless the access is what makes it hold one.
void Block::check_state(Warp& w, int lane, uint32_t cell, int pc, bool write) {
  const uint8_t state = shadow_.state[cell];
  const int thread = w.number * kWarp + lane, other = shadow_.accesses[shadow_.write[cell]].pc;
  const std::string where = "at " + std::to_string(cell * 2);
  if (state == kUnderWay) {
    find(write ? "asynchronous copy under way, written" : "asynchronous copy under way, read", pc,
         other, thread, where);
  } else if (state == kMbarrier) {
    find("plain access to an mbarrier", pc, other, thread, where);
  } else if (!write || kernel_.code[static_cast<size_t>(pc)].op == ATOM) {
    find("uninitialised, shared", pc, -1, thread, where);
  }
}

// The last write has to be before this read.
void Block::read_cell(Warp& w, int lane, uint32_t cell, int pc) {
  const uint32_t write = shadow_.write[cell];
  if (write == 0) return;
  const Access& a = shadow_.accesses[write];
  const uint32_t agent = a.agents + shadow_.writer[cell];
  if (ordered(w, lane, agent, a.time)) return;
  race("race, shared, read after write", pc, a.pc, w.number * kWarp + lane, agent, cell * 2);
}

void Block::note_read(Warp& w, uint32_t lanes, uint32_t cell, uint32_t access) {
  const auto v = static_cast<size_t>(w.number);
  const uint32_t bit = 1u << v;
  uint32_t& read = shadow_.read[v][cell];
  uint32_t& readers = shadow_.lanes[v][cell];
  const bool joins = (shadow_.readers[cell] & bit) && read >= w.synced;
  readers = joins ? readers | lanes : lanes;
  read = access;
  shadow_.readers[cell] |= bit;
}

// The last write and all reads since have to be before this write.
void Block::write_cell(Warp& w, int lane, uint32_t cell, uint32_t access, int pc) {
  SharedShadow& s = shadow_;
  const int thread = w.number * kWarp + lane;
  if (s.write[cell]) {
    const Access& a = s.accesses[s.write[cell]];
    const uint32_t agent = a.agents + s.writer[cell];
    if (!ordered(w, lane, agent, a.time) && !both_atomic(a.pc, pc)) {
      race("race, shared, write after write", pc, a.pc, thread, agent, cell * 2);
    }
  }
  for (uint32_t left = s.readers[cell]; left; left &= left - 1) {
    const auto v = static_cast<size_t>(__builtin_ctz(left));
    const Access& a = s.accesses[s.read[v][cell]];
    if (a.time < w.floor[v]) continue;
    for (uint32_t lanes = s.lanes[v][cell]; lanes; lanes &= lanes - 1) {
      const auto agent = static_cast<uint32_t>(v * kWarp) +
                         static_cast<uint32_t>(__builtin_ctz(lanes));
      if (ordered(w, lane, agent, a.time)) continue;
      race("race, shared, write after read", pc, a.pc, thread, agent, cell * 2);
      break;
    }
  }
  s.write[cell] = access, s.writer[cell] = static_cast<uint8_t>(lane);
  s.state[cell] = kWritten, s.readers[cell] = 0;
}

static uint64_t eight(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

// The cells of a row of ldmatrix, each for the lane that gets it. Most rows are of one write, which
// is checked once.
void Block::read_row(Warp& w, uint32_t cell, const uint32_t* lanes, uint32_t access) {
  constexpr uint64_t kEach = 0x0101010101010101;
  SharedShadow& s = shadow_;
  const uint32_t* write = s.write.data() + cell;
  uint32_t differ = 0;
  for (uint32_t n = 0; n < kRow; ++n) differ |= write[n] ^ write[0];
  const uint8_t writer = s.writer[cell];
  const Access& a = s.accesses[write[0]];
  const uint32_t warp = a.agents / kWarp;  // if the write is no asynchronous copy
  const bool fine = !differ && eight(&s.state[cell]) == kWritten * kEach &&
                    ((warp < warp_count() && a.time < w.floor[warp]) ||
                     (eight(&s.writer[cell]) == writer * kEach &&
                      a.time < w.clock.of(a.agents + writer)));
  if (!fine) {
    const int pc = s.accesses[access].pc;
    for (uint32_t n = 0; n < kRow; ++n) {
      const int lane = __builtin_ctz(lanes[n]);
      if (s.state[cell + n] != kWritten) check_state(w, lane, cell + n, pc, false);
      read_cell(w, lane, cell + n, pc);
    }
  }
  const auto v = static_cast<size_t>(w.number);
  uint32_t* read = s.read[v].data() + cell;
  uint32_t* readers = s.lanes[v].data() + cell;
  uint32_t* by = s.readers.data() + cell;
  const uint32_t bit = 1u << v, synced = w.synced;
  for (uint32_t n = 0; n < kRow; ++n) {
    const bool joins = (by[n] & bit) != 0 && read[n] >= synced;
    readers[n] = (joins ? readers[n] : 0) | lanes[n];
    read[n] = access;
    by[n] |= bit;
  }
}

}  // namespace ptxsim
