// mbarrier objects: a count of arrivals and of bytes that are to land, phase by phase.
//
// A phase is over when no arrival and no byte is pending; the next begins at once. An arrival
// releases the thread's clock into the phase, a successful wait acquires what the phase that is
// over has collected. (PTX ISA 9.7.13.15.)
#include "block.h"

namespace ptxsim {

constexpr uint32_t kMbarrierBytes = 8, kMostArrivals = (1u << 20) - 1;

// The barrier at this address, if it is one and its initialisation is before this use.
Mbarrier* Block::mbarrier_at(Warp& w, int lane, uint64_t address, int pc) {
  const auto at = static_cast<uint32_t>(address & (kSharedWindow - 1));
  const auto found = mbarriers_.find(at);
  const int thread = w.number * kWarp + lane;
  if (found == mbarriers_.end() || !found->second.live) {
    find("mbarrier not initialised", pc, -1, thread,
         "at " + std::to_string(static_cast<long>(at) - kSharedBase));
    return nullptr;
  }
  if (!options_.check) return &found->second;
  const uint32_t cell = (at - kSharedBase) / 2;
  const Access& init = shadow_.accesses[shadow_.write[cell]];
  const uint32_t agent = init.agents + shadow_.writer[cell];
  if (!ordered(w, lane, agent, init.time)) {
    race("race, shared, mbarrier used without a barrier after its initialisation", pc, init.pc,
         thread, agent, at - kSharedBase);
  }
  note_read(w, 1u << lane, cell, access_of(w, pc));  // a later init or inval has to be ordered
  return &found->second;
}

void Block::mbarrier_init(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  Lanes address, count{};
  fetch_address(w, i.in[0], address);
  if (i.op == MBAR_INIT) fetch(w, i.in[1], count);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    const auto at = static_cast<uint32_t>(address[l] & (kSharedWindow - 1));
    const int thread = w.number * kWarp + lane;
    if (!in_shared(w, lane, at, kMbarrierBytes, pc, true)) continue;
    Mbarrier& b = mbarriers_[at];
    if (i.op == MBAR_INIT && b.live) {
      find("mbarrier.init of an mbarrier in use", pc, -1, thread, "");
    } else if (i.op == MBAR_INVAL && !b.live) {
      find("mbarrier not initialised", pc, -1, thread, "");
    }
    if (i.op == MBAR_INIT && (count[l] == 0 || count[l] > kMostArrivals)) {
      find("mbarrier.init with a count out of range", pc, -1, thread, std::to_string(count[l]));
    }
    const uint32_t first = (at - kSharedBase) / 2, access = access_of(w, pc);
    for (uint32_t cell = first; cell < first + kMbarrierBytes / 2; ++cell) {
      if (options_.check) write_cell(w, lane, cell, access, pc);
      shadow_.state[cell] = i.op == MBAR_INIT ? kMbarrier : kUnwritten;
    }
    b = Mbarrier();
    b.live = i.op == MBAR_INIT;
    b.expected = b.pending = static_cast<uint32_t>(count[l]);
    b.agent = 2 * warp_count() * kWarp + mbarrier_agents_++;
  }
}

void Block::complete_phase(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase, ++events_;
  b.pending = b.expected;
  b.completed = b.arriving;  // the clocks of later phases include those of earlier ones
}

void Block::arrive(Mbarrier& b, uint32_t count, int pc, int thread) {
  ++events_;
  if (count == 0 || count > b.pending) {
    find("more arrivals at an mbarrier than it expects", pc, -1, thread,
         std::to_string(count) + " where " + std::to_string(b.pending) + " are pending");
    return;
  }
  b.pending -= count;
  complete_phase(b);
}

// mbarrier.arrive, with or without expect_tx, and mbarrier.expect_tx.
void Block::mbarrier_arrive(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  Lanes address, count, state{};
  fetch_address(w, i.in[0], address);
  fetch(w, i.in[1], count);
  const Time before = w.now;
  Time released = before;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    Mbarrier* b = mbarrier_at(w, lane, address[l], pc);
    if (!b) continue;
    const auto number = static_cast<uint32_t>(count[l]);
    if (i.op == MBAR_EXPECT || i.expects) b->bytes += number;
    state[l] = b->phase;
    if (i.op == MBAR_EXPECT) continue;
    if (i.drop && b->expected) --b->expected;
    if (!i.relaxed) {
      if (released == before) {
        release(w, 1u << lane, b->arriving);
        std::swap(released, w.now);  // the lanes arrive at once: one time for all
      } else {
        b->arriving.join(w.clock);
        if (w.alone >> lane & 1) b->arriving.join(*w.lane_clock[l]);
        b->arriving.raise(static_cast<uint32_t>(w.number * kWarp + lane), released);
      }
    }
    arrive(*b, i.expects ? 1 : number, pc, w.number * kWarp + lane);
  }
  w.now = std::max(w.now, released);
  if (!i.to.empty()) store(w, i.to[0], state, mask);
}

// mbarrier.test_wait and try_wait. False if the phase of some thread is not over.
bool Block::mbarrier_wait(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  Lanes address, wanted, done{};
  fetch_address(w, i.in[0], address);
  fetch(w, i.in[1], wanted);
  uint32_t over = 0;
  const Mbarrier* one = nullptr;  // that all lanes wait for
  bool same = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto l = static_cast<size_t>(lane);
    const Mbarrier* b = mbarrier_at(w, lane, address[l], pc);
    if (!b) {
      failed_ = true;
      return true;
    }
    done[l] = i.parity ? (b->phase & 1) != (wanted[l] & 1) : b->phase > wanted[l];
    if (done[l]) over |= 1u << lane;
    if (one && one != b) same = false;
    one = b;
  }
  if (same && over && !i.relaxed) {
    acquire(w, over, one->completed);
  } else if (!i.relaxed) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(over >> lane & 1)) continue;
      const uint64_t at = address[static_cast<size_t>(lane)] & (kSharedWindow - 1);
      acquire(w, 1u << lane, mbarriers_[static_cast<uint32_t>(at)].completed);
    }
  }
  store(w, i.to[0], done, mask);
  return over == mask;
}

}  // namespace ptxsim
