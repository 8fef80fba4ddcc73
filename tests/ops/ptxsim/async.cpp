// Asynchronous copies to shared memory. A copy lands as late as it may: at the wait of its own
// thread, or, if an mbarrier tracks it, when nothing else can go on. Until then its place holds
// 0xFF, and who touches it is told so.
#include <cstring>

#include "block.h"

namespace ptxsim {

// Source and destination of one copy: bounds, alignment. The source counts as read here.
bool Block::copy_check(Warp& w, int lane, const Copy& c) {
  const int thread = w.number * kWarp + lane;
  if (c.source_size > c.size) {
    find("cp.async takes more than it copies", c.pc, -1, thread, std::to_string(c.source_size));
    return false;
  }
  const uint32_t unit = std::min(c.size, 16u);
  if (c.from % unit) {
    find("misaligned, global", c.pc, -1, thread, "source of a copy of " + std::to_string(c.size));
  }
  bool fine = true;
  for (uint32_t at = 0, piece = unit; fine && at < c.source_size; at += piece) {
    while (piece > c.source_size - at) piece /= 2;
    fine = global_access(w, lane, c.from + at, piece, c.pc, false);
  }
  if (c.to < kSharedBase || uint64_t{c.to} + c.size > uint64_t{kSharedBase} + shared_bytes_) {
    find("out of bounds, shared write", c.pc, -1, thread,
         "copy to " + std::to_string(static_cast<long>(c.to) - kSharedBase));
    return false;
  }
  if (c.to % unit) {
    find("misaligned, shared", c.pc, -1, thread, "copy to " + std::to_string(c.to - kSharedBase));
  }
  return fine;
}

// The write may happen any time until the wait: nobody may use the place from here on.
void Block::copy_under_way(Warp& w, int lane, const Copy& c) {
  std::memset(shared_.data() + (c.to - kSharedBase), 0xFF, c.size);
  if (!options_.check) return;
  const uint32_t access = access_of(w, c.pc), first = (c.to - kSharedBase) / 2;
  for (uint32_t cell = first; cell < first + c.size / 2; ++cell) {
    if (shadow_.state[cell] != kWritten) check_state(w, lane, cell, c.pc, true);
    write_cell(w, lane, cell, access, c.pc);
    shadow_.state[cell] = kUnderWay;
  }
}

void Block::copy_start(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  Lanes to, from, size, source;
  fetch_address(w, i.in[0], to);
  fetch_address(w, i.in[1], from);
  fetch(w, i.in[2], size);
  fetch(w, i.in[3], source);
  const auto bytes = static_cast<uint32_t>(size[0]);
  Count& count = result_.counts[static_cast<size_t>(pc)];
  uint64_t ideal;
  count.wavefronts += wavefronts(to, mask, bytes, ideal);
  count.ideal += ideal;
  uint32_t reading = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    const Copy c{static_cast<uint32_t>(to[l]), from[l], bytes, static_cast<uint32_t>(source[l]),
                 pc};
    if (c.source_size) reading |= 1u << lane;
    if (!copy_check(w, lane, c)) continue;
    copy_under_way(w, lane, c);
    w.open[l].push_back(c);
  }
  count.sectors += sectors(from, reading, bytes);
  count.bytes += uint64_t{bytes} * static_cast<uint64_t>(__builtin_popcount(reading));
}

void Block::land(const Copy& c, uint32_t access, int lane) {
  uint8_t* to = shared_.data() + (c.to - kSharedBase);
  std::memcpy(to, reinterpret_cast<const void*>(c.from), c.source_size);
  std::memset(to + c.source_size, 0, c.size - c.source_size);
  if (!options_.check) return;
  const uint32_t first = (c.to - kSharedBase) / 2;
  for (uint32_t cell = first; cell < first + c.size / 2; ++cell) {
    shadow_.state[cell] = kWritten;
    shadow_.write[cell] = access, shadow_.writer[cell] = static_cast<uint8_t>(lane);
  }
}

void Block::copies_commit(Warp& w, uint32_t mask) {
  for (size_t l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    w.groups[l].push_back(std::move(w.open[l]));
    w.open[l].clear();
  }
}

// cp.async.wait_group: the thread sees its own copies; to others they are like its own stores.
void Block::copies_wait(Warp& w, uint32_t mask, const Instruction& i) {
  const size_t left = i.in[0].value;
  for (size_t n = flights_.size(); n-- > 0 && left == 0;) {
    if (!flights_[n].bulk && flights_[n].warp == w.number) land_flight(n);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    for (auto& groups = w.groups[l]; groups.size() > left; groups.pop_front()) {
      for (const Copy& c : groups.front()) land(c, access_of(w, c.pc), lane);
    }
    if (!i.wait_all) continue;
    for (const Copy& c : w.open[l]) land(c, access_of(w, c.pc), lane);
    w.open[l].clear();
  }
  if (left > 0) return;
  for (int lane = 0; lane < kWarp; ++lane) {  // those that an mbarrier tracked have landed too
    const uint32_t agent = copies_of(w.number) + static_cast<uint32_t>(lane);
    if (!(mask >> lane & 1) || !tracked_.count(agent)) continue;
    VectorClock landed;
    landed.raise(agent, ++time_);
    acquire(w, 1u << lane, landed);
  }
}

// cp.async.mbarrier.arrive: an arrival when all copies that the thread has started have landed.
void Block::copies_arrive(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  Lanes address;
  fetch_address(w, i.in[0], address);
  Flight flight{w.number, pc, false, 0, {}, {}};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    Mbarrier* b = mbarrier_at(w, lane, address[l], pc);
    if (!b) continue;
    if (!i.no_increment) ++b->pending;
    flight.lanes |= 1u << lane;
    flight.barrier[l] = static_cast<uint32_t>(address[l] & (kSharedWindow - 1));
    for (auto& group : w.groups[l]) {
      for (const Copy& c : group) flight.copies[l].push_back(c);
    }
    for (const Copy& c : w.open[l]) flight.copies[l].push_back(c);
    w.groups[l].clear(), w.open[l].clear();
  }
  flights_.push_back(std::move(flight));
  ++events_;
}

// cp.async.bulk: one copy of each thread, tracked by the bytes that an mbarrier expects.
void Block::bulk_start(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  Lanes to, from, size, barrier;
  fetch_address(w, i.in[0], to);
  fetch_address(w, i.in[1], from);
  fetch(w, i.in[2], size);
  fetch_address(w, i.in[3], barrier);
  Count& count = result_.counts[static_cast<size_t>(pc)];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    const auto bytes = static_cast<uint32_t>(size[l]);
    if (bytes == 0 || bytes % 16) {
      find("bulk copy of no multiple of 16 bytes", pc, -1, w.number * kWarp + lane,
           std::to_string(bytes));
      continue;
    }
    const Copy c{static_cast<uint32_t>(to[l] & (kSharedWindow - 1)), from[l], bytes, bytes, pc};
    if (!mbarrier_at(w, lane, barrier[l], pc) || !copy_check(w, lane, c)) continue;
    copy_under_way(w, lane, c);
    count.bytes += bytes, count.sectors += bytes / 32;
    Flight flight{w.number, pc, true, 1u << lane, {}, {}};
    flight.copies[l] = {c};
    flight.barrier[l] = static_cast<uint32_t>(barrier[l] & (kSharedWindow - 1));
    flights_.push_back(std::move(flight));
  }
  ++events_;
}

// The oldest, or by the order of the options the latest or any; those of a warp in their order.
bool Block::land_one() {
  if (flights_.empty()) return false;
  size_t which = 0;
  if (options_.order == kLast) which = flights_.size() - 1;
  if (options_.order == kRandom) which = random_() % flights_.size();
  if (!flights_[which].bulk) {
    for (size_t n = 0; n < which; ++n) {
      if (!flights_[n].bulk && flights_[n].warp == flights_[which].warp) which = n;
    }
  }
  land_flight(which);
  return true;
}

void Block::land_flight(size_t which) {
  const Flight flight = std::move(flights_[which]);
  flights_.erase(flights_.begin() + static_cast<std::ptrdiff_t>(which));
  const Time now = ++time_;
  ++time_;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(flight.lanes >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    Mbarrier& b = mbarriers_[flight.barrier[l]];
    // Bulk copies belong to their barrier, others to their thread: see clocks.h.
    const uint32_t agent = flight.bulk ? b.agent : copies_of(flight.warp) +
                                                   static_cast<uint32_t>(lane);
    const auto access = static_cast<uint32_t>(shadow_.accesses.size());
    shadow_.accesses.push_back({now, agent, flight.pc});
    for (const Copy& c : flight.copies[l]) {
      shadow_.accesses[access].pc = c.pc;
      land(c, access, 0);
      if (flight.bulk) b.bytes -= c.size;
    }
    b.arriving.raise(agent, now + 1);
    if (!flight.bulk) tracked_.insert(agent);
    if (flight.bulk) complete_phase(b);
    else arrive(b, 1, flight.pc, flight.warp * kWarp + lane);
  }
  ++events_;
}

void Block::check_flights() {
  for (const Flight& f : flights_) {
    find("asynchronous copy under way, at the end", f.pc, -1,
         f.warp * kWarp + __builtin_ctz(f.lanes ? f.lanes : 1), "tracked by an mbarrier");
  }
}

}  // namespace ptxsim
