// Barriers of threads, and the vector clocks that they order accesses with.
#include "block.h"

namespace ptxsim {

void Block::start_clocks() {
  time_ = 1;
  for (Warp& w : warps_) {
    w.now = 1, w.alone = 0, w.synced = 0;
    w.clock.seen.assign(warp_count() * 32, 0);
    w.floor.assign(warp_count(), 0);
    w.access_at.assign(kernel_.code.size(), {0, 0});
  }
}

// The least that the warp's clock has seen of every warp: below that all lanes' accesses are fine.
void Block::refresh_floor(Warp& w) {
  for (uint32_t v = 0; v < warp_count(); ++v) {
    const Time* seen = w.clock.seen.data() + v * kWarp;
    const uint32_t count = std::min<uint32_t>(kWarp, threads_ - v * kWarp);
    Time least = seen[0];
    for (uint32_t l = 1; l < count; ++l) least = std::min(least, seen[l]);
    w.floor[v] = least;
  }
}

// bar.warp.sync: the lanes see each other's accesses, and what single lanes had acquired.
void Block::sync_lanes(Warp& w) {
  w.now = ++time_;
  const uint32_t first = static_cast<uint32_t>(w.number) * kWarp;
  std::fill_n(w.clock.seen.begin() + first, kWarp, w.now);
  w.floor[static_cast<size_t>(w.number)] = w.now;
  w.synced = static_cast<uint32_t>(shadow_.accesses.size());
  if (!w.alone) return;
  for (int l = 0; l < kWarp; ++l) {
    if (w.alone >> l & 1) w.clock.join(*w.lane_clock[static_cast<size_t>(l)]);
  }
  w.alone = 0;
  refresh_floor(w);
}

// What the lanes have done, and what they have seen, goes into a barrier's clock.
void Block::release(Warp& w, uint32_t lanes, VectorClock& into) {
  into.join(w.clock);
  w.now = ++time_;
  for (int l = 0; l < kWarp; ++l) {
    if (!(lanes >> l & 1)) continue;
    into.raise(static_cast<uint32_t>(w.number * kWarp + l), w.now);
    if (w.alone >> l & 1) into.join(*w.lane_clock[static_cast<size_t>(l)]);
  }
}

void Block::acquire(Warp& w, uint32_t lanes, const VectorClock& from) {
  if (lanes == w.alive) {
    w.clock.join(from);
    refresh_floor(w);
    return;
  }
  for (int l = 0; l < kWarp; ++l) {
    if (!(lanes >> l & 1)) continue;
    auto& clock = w.lane_clock[static_cast<size_t>(l)];
    if (!clock) clock = std::make_unique<VectorClock>();
    if (!(w.alone >> l & 1)) clock->seen.clear();
    clock->join(from);
    w.alone |= 1u << l;
  }
}

// Is an access by that agent at that time before what this thread does now?
bool Block::ordered(const Warp& w, int lane, uint32_t agent, Time time) const {
  if (agent == static_cast<uint32_t>(w.number * kWarp + lane)) return true;
  if (time < w.clock.of(agent)) return true;
  return (w.alone >> lane & 1) && time < w.lane_clock[static_cast<size_t>(lane)]->of(agent);
}

// bar.sync id[, threads] and bar.arrive id, threads, by a whole warp.
void Block::barrier(Warp& w, const Instruction& i, int pc) {
  Lanes id, count;
  fetch(w, i.in[0], id);
  const size_t lane = static_cast<size_t>(__builtin_ctz(w.alive));
  NamedBarrier& b = barriers_[static_cast<int>(id[lane])];
  uint32_t needed = 0;
  if (i.in.size() > 1) {
    fetch(w, i.in[1], count);
    needed = static_cast<uint32_t>(count[lane]) / kWarp;
    if (count[lane] % kWarp || needed == 0 || id[lane] > 15) {
      return stop("barrier of no whole warps, or above 15", pc, w.number * kWarp, i.text);
    }
  }
  if (b.arrived && b.needed != needed) {
    return stop("warps wait at a barrier with different counts", pc, w.number * kWarp, i.text);
  }
  b.needed = needed;
  ++b.arrived, ++events_;
  release(w, w.alive, b.clock);
  if (i.op == BAR_SYNC) w.barrier = static_cast<int>(id[lane]), w.waiting_pc = pc;
  complete_barriers();
}

// Lets the warps go whose barrier has all its arrivals.
void Block::complete_barriers() {
  uint32_t running = 0;
  for (const Warp& w : warps_) running += w.alive != 0;
  for (auto& [id, b] : barriers_) {
    if (b.arrived == 0 || b.arrived < (b.needed ? b.needed : running)) continue;
    for (Warp& w : warps_) {
      if (w.barrier != id) continue;
      w.barrier = -1;
      w.clock.join(b.clock);
      sync_lanes(w);
      refresh_floor(w);
    }
    b = NamedBarrier();
    ++events_;
  }
}

}  // namespace ptxsim
