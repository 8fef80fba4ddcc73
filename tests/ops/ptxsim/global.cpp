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

// One access to a line or a cell: races with the accesses before.
void Block::touch(Touch& t, Warp& w, int lane, int pc, bool write, uint64_t offset) {
  const int thread = w.number * kWarp + lane;
  if (t.launch != this_launch()) {
    const bool written = t.written;
    t = Touch(), t.launch = this_launch(), t.written = written;
  }
  const auto atomic = [&](int other) {
    return other >= 0 && kernel_.code[static_cast<size_t>(other)].op == ATOM &&
           kernel_.code[static_cast<size_t>(pc)].op == ATOM;
  };
  if (t.writer_block != -1 && t.writer_block != number_) {
    if (!atomic(t.write_pc)) {
      race(write ? "race, global, other block, write after write"
                 : "race, global, other block, read after write",
           pc, t.write_pc, thread, static_cast<uint32_t>(t.writer), offset);
    }
  } else if (t.writer >= 0 && !atomic(t.write_pc) &&
             !ordered(w, lane, static_cast<uint32_t>(t.writer), t.write_time)) {
    race(write ? "race, global, write after write" : "race, global, read after write", pc,
         t.write_pc, thread, static_cast<uint32_t>(t.writer), offset);
  }
  if (!write) {
    if (t.reader_block != number_) t.readers = 0, t.last_reader = -1;
    const bool again = t.last_reader == w.number && t.last_read == w.now;
    if (t.readers == 0) t.first_read = w.now;
    t.last_lanes = (again ? t.last_lanes : 0) | 1u << lane;
    t.last_reader = static_cast<int8_t>(w.number), t.last_read = w.now, t.read_pc = pc;
    t.readers |= 1u << w.number;
    t.reader_block = t.reader_block == -1 || t.reader_block == number_ ? number_ : -2;
    return;
  }
  bool conflict = t.reader_block != -1 && t.reader_block != number_;
  if (conflict && !atomic(t.read_pc)) {
    race("race, global, other block, write after read", pc, t.read_pc, thread, 0, offset);
  } else if (t.reader_block == number_) {
    for (uint32_t v = 0; v < warp_count() && !conflict; ++v) {
      if (!(t.readers >> v & 1)) continue;
      const bool newest = t.last_reader == static_cast<int>(v);
      const Time time = newest ? t.last_read : t.first_read;
      for (int l = 0; l < kWarp && !conflict; ++l) {
        if (newest ? !(t.last_lanes >> l & 1) : v == static_cast<uint32_t>(w.number)) continue;
        if (v * kWarp + static_cast<uint32_t>(l) >= threads_) continue;
        conflict = !ordered(w, lane, v * kWarp + static_cast<uint32_t>(l), time);
      }
    }
    if (conflict && !atomic(t.read_pc)) {
      race("race, global, write after read", pc, t.read_pc, thread,
           static_cast<uint32_t>(t.last_reader * kWarp), offset);
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
  const uint64_t lines = last_->bytes / kLine + 1;
  if (last_->lines.empty()) last_->lines.resize(lines), last_->cells_used.resize(lines);
  const uint64_t offset = address - last_->base, line = offset / kLine;
  const bool whole = bytes == kLine && offset % kLine == 0;
  const bool has_cells = last_->cells_used[line] == this_launch();
  const uint64_t first = offset / kCell, end = (offset + bytes + kCell - 1) / kCell;
  Touch& whole_line = last_->lines[line];
  if (!write) {
    if (whole && !has_cells) {
      const bool cells = !last_->cells.empty();
      for (uint64_t at = 0; at < kLine; at += 8) {
        if (whole_line.written) break;
        if (cells && last_->cells[(offset + at) / kCell].written) continue;
        uninitialised(whole_line, offset + at, pc, thread);
      }
    }
  }
  // A line is touched as such where it is accessed as a whole, and cells where they are.
  const uint64_t last_line = (offset + bytes - 1) / kLine;
  if (whole && !has_cells) {
    touch(whole_line, w, lane, pc, write, offset);
    return true;
  }
  if (last_->cells.empty()) last_->cells.resize(lines * (kLine / kCell));
  for (uint64_t l = line; l <= last_line; ++l) {
    if (last_->cells_used[l] == this_launch()) continue;
    last_->cells_used[l] = this_launch();
    for (uint64_t c = l * kLine / kCell; c < (l + 1) * kLine / kCell; ++c) {
      const bool written = last_->cells[c].written;
      last_->cells[c] = last_->lines[l];  // what was known of the line holds for its cells
      last_->cells[c].written |= written;
    }
  }
  for (uint64_t c = first; c < end; ++c) {
    if (!write) uninitialised(last_->cells[c], c * kCell, pc, thread);
    if (bytes > 1) touch(last_->cells[c], w, lane, pc, write, c * kCell);
    else if (write) last_->cells[c].written = true;  // shared with a neighbour: no races
  }
  return true;
}

}  // namespace ptxsim
