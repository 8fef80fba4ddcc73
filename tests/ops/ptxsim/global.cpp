// Global memory: every access lies in one allocation; reads of what nobody wrote; races.
#include "global.h"

#include <cstdio>
#include <cstring>
#include <map>

#include "block.h"

namespace ptxsim {

constexpr uint64_t kLine = 16, kCell = 2;  // bytes

static std::map<uint64_t, Allocation>& allocations() {
  static std::map<uint64_t, Allocation> all;
  return all;
}
static uint32_t& launch_number() {
  static uint32_t number = 0;
  return number;
}
std::mutex& global_lock() {
  static std::mutex lock;
  return lock;
}
uint32_t next_launch() { return ++launch_number(); }
uint32_t this_launch() { return launch_number(); }

void add_allocation(const void* base, uint64_t bytes) {
  std::lock_guard<std::mutex> guard(global_lock());
  const auto address = reinterpret_cast<uint64_t>(base);
  allocations()[address] = Allocation{address, bytes, {}, {}, {}};
}
void remove_allocation(const void* base) {
  std::lock_guard<std::mutex> guard(global_lock());
  allocations().erase(reinterpret_cast<uint64_t>(base));
}

Allocation* allocation_before(uint64_t address) {
  const auto after = allocations().upper_bound(address);
  return after == allocations().begin() ? nullptr : &std::prev(after)->second;
}
Allocation* allocation_of(uint64_t address, uint64_t bytes) {
  Allocation* a = allocation_before(address);
  return a && address + bytes <= a->base + a->bytes ? a : nullptr;
}

void Block::global_bounds(uint64_t address, uint32_t bytes, int pc, int thread, bool write) {
  char text[160];
  const Allocation* a = allocation_before(address);
  if (a) {
    std::snprintf(text, sizeof text, "%u bytes at byte %lu of an allocation of %lu", bytes,
                  static_cast<unsigned long>(address - a->base),
                  static_cast<unsigned long>(a->bytes));
  } else {
    std::snprintf(text, sizeof text, "%u bytes at 0x%lx, below all allocations", bytes,
                  static_cast<unsigned long>(address));
  }
  find(write ? "out of bounds, global write" : "out of bounds, global read", pc, -1, thread, text);
}

// The host's writes are not seen: what still has the pattern of fresh memory counts as unwritten.
void Block::uninitialised(const Touch& t, uint64_t offset, int pc, int thread) {
  if (t.written) return;
  const uint64_t word = (last_->base + offset) / 8 * 8;
  if (word < last_->base || word + 8 > last_->base + last_->bytes) return;
  uint64_t value, poison;
  std::memcpy(&value, reinterpret_cast<const void*>(word), 8);
  std::memset(&poison, kPoison, 8);
  if (value != poison) return;
  find("uninitialised, global", pc, -1, thread,
       "byte " + std::to_string(offset) + " of " + std::to_string(last_->bytes));
}

bool Block::both_atomic(int pc, int other) const {
  return pc >= 0 && other >= 0 && kernel_.code[static_cast<size_t>(pc)].op == ATOM &&
         kernel_.code[static_cast<size_t>(other)].op == ATOM;
}

// One access to a line or a cell: the last write has to be before it.
void Block::touch(Touch& t, Warp& w, int lane, int pc, bool write, uint64_t offset) {
  const int thread = w.number * kWarp + lane;
  if (t.launch != this_launch()) {
    const bool written = t.written;
    t = Touch(), t.launch = this_launch(), t.written = written;
  }
  const bool other_block = t.writer_block != -1 && t.writer_block != number_;
  const bool fine = t.writer_block == -1 || both_atomic(t.write_pc, pc) ||
                    (!other_block &&
                     ordered(w, lane, static_cast<uint32_t>(t.writer), t.write_time));
  if (!fine && other_block) {
    race(write ? "race, global, other block, write after write"
               : "race, global, other block, read after write",
         pc, t.write_pc, thread, static_cast<uint32_t>(t.writer), offset);
  } else if (!fine) {
    race(write ? "race, global, write after write" : "race, global, read after write", pc,
         t.write_pc, thread, static_cast<uint32_t>(t.writer), offset);
  }
  if (!write) return touch_read(t, w, lane, pc);
  touch_write(t, w, lane, pc, offset);
}

void Block::touch_read(Touch& t, const Warp& w, int lane, int pc) {
  if (t.reader_block != number_) t.readers = 0, t.last_reader = -1;
  const bool again = t.last_reader == w.number && t.last_read == w.now;
  if (t.readers == 0) t.first_read = w.now;
  t.last_lanes = (again ? t.last_lanes : 0) | 1u << lane;
  t.last_reader = static_cast<int8_t>(w.number), t.last_read = w.now, t.read_pc = pc;
  t.readers |= 1u << w.number;
  t.reader_block = t.reader_block == -1 || t.reader_block == number_ ? number_ : -2;
}

// A thread of this block that has read and is not ordered before this write; -1 if there is none.
// Of the warp that read last its lanes and time are known, of others the first read's time.
int Block::unordered_reader(const Touch& t, const Warp& w, int lane) const {
  for (uint32_t v = 0; v < warp_count(); ++v) {
    if (!(t.readers >> v & 1)) continue;
    const bool newest = t.last_reader == static_cast<int>(v);
    if (!newest && v == static_cast<uint32_t>(w.number)) continue;
    for (uint32_t l = 0; l < kWarp && v * kWarp + l < threads_; ++l) {
      if (newest && !(t.last_lanes >> l & 1)) continue;
      const Time time = newest ? t.last_read : t.first_read;
      if (!ordered(w, lane, v * kWarp + l, time)) return static_cast<int>(v * kWarp + l);
    }
  }
  return -1;
}

// All reads since the last write have to be before this write.
void Block::touch_write(Touch& t, const Warp& w, int lane, int pc, uint64_t offset) {
  const int thread = w.number * kWarp + lane;
  if (!both_atomic(t.read_pc, pc)) {
    if (t.reader_block != -1 && t.reader_block != number_) {
      race("race, global, other block, write after read", pc, t.read_pc, thread, 0, offset);
    } else if (const int reader = unordered_reader(t, w, lane); reader >= 0) {
      race("race, global, write after read", pc, t.read_pc, thread,
           static_cast<uint32_t>(reader), offset);
    }
  }
  t.writer_block = number_, t.writer = static_cast<int16_t>(thread), t.write_time = w.now;
  t.write_pc = pc, t.written = true;
  t.readers = 0, t.reader_block = -1, t.last_reader = -1;
}

bool Block::global_access(Warp& w, int lane, uint64_t address, uint32_t bytes, int pc,
                          bool write) {
  const int thread = w.number * kWarp + lane;
  if (!last_ || address < last_->base || address + bytes > last_->base + last_->bytes) {
    last_ = allocation_of(address, bytes);
  }
  if (!last_) {
    global_bounds(address, bytes, pc, thread, write);
    return false;
  }
  if (address % bytes) {
    find("misaligned, global", pc, -1, thread,
         std::to_string(bytes) + " bytes at byte " + std::to_string(address - last_->base));
  }
  if (!options_.check) return true;
  check_global(w, lane, address - last_->base, bytes, pc, write);
  return true;
}

// Lines that are accessed as a whole are checked as such; at the first access to a part of one,
// its cells take over for the rest of the launch.
void Block::check_global(Warp& w, int lane, uint64_t offset, uint32_t bytes, int pc, bool write) {
  Allocation& a = *last_;
  const int thread = w.number * kWarp + lane;
  const uint64_t lines = a.bytes / kLine + 1, line = offset / kLine;
  if (a.lines.empty()) a.lines.resize(lines), a.cells_used.resize(lines);
  if (bytes == kLine && offset % kLine == 0 && a.cells_used[line] != this_launch()) {
    for (uint64_t at = offset; !write && at < offset + kLine; at += 8) {
      const bool written = !a.cells.empty() && a.cells[at / kCell].written;
      if (!written) uninitialised(a.lines[line], at, pc, thread);
    }
    return touch(a.lines[line], w, lane, pc, write, offset);
  }
  if (a.cells.empty()) a.cells.resize(lines * (kLine / kCell));
  for (uint64_t l = line; l <= (offset + bytes - 1) / kLine; ++l) {
    if (a.cells_used[l] == this_launch()) continue;
    a.cells_used[l] = this_launch();
    for (uint64_t c = l * kLine / kCell; c < (l + 1) * kLine / kCell; ++c) {
      const bool written = a.cells[c].written;
      a.cells[c] = a.lines[l];
      a.cells[c].written |= written;
    }
  }
  for (uint64_t c = offset / kCell; c < (offset + bytes + kCell - 1) / kCell; ++c) {
    if (!write || both_atomic(pc, pc)) uninitialised(a.cells[c], c * kCell, pc, thread);
    if (bytes > 1) touch(a.cells[c], w, lane, pc, write, c * kCell);
    else if (write) a.cells[c].written = true;  // shared with a neighbour: no races
  }
}

}  // namespace ptxsim
