// Which warp runs, and which of its threads: until they part, come together, wait or end.
//
// The threads of a warp that are at the lowest address run first and wait for the others at
// instructions of the whole warp. A warp runs until it waits: at a barrier of the block for all
// others, at an mbarrier for its next turn. When a round of turns has changed nothing, an
// asynchronous copy lands; if none is under way, the block is deadlocked.
#include <numeric>

#include "block.h"

namespace ptxsim {

constexpr int kIdleRounds = 200;  // of polling, before it counts as a deadlock

Block::Block(const Kernel& kernel, Dim grid, uint32_t threads, uint32_t shared_bytes,
             const std::vector<uint8_t>& params, const Options& options, Result& result)
    : kernel_(kernel), grid_(grid), threads_(threads), shared_bytes_(shared_bytes),
      params_(params), options_(options), result_(result) {}

void Block::stop(const char* kind, int pc, int thread, const std::string& more) {
  find(kind, pc, -1, thread, more);
  failed_ = true;
}

void Block::start() {
  const uint32_t count = (threads_ + kWarp - 1) / kWarp;
  warps_.resize(count);
  shared_.assign(shared_bytes_, 0xFF);
  shadow_.reset(shared_bytes_, count);
  mbarriers_.clear(), barriers_.clear(), flights_.clear();
  mbarrier_agents_ = 0;
  random_.seed(options_.seed + static_cast<uint64_t>(number_));
  for (uint32_t n = 0; n < count; ++n) {
    Warp& w = warps_[n];
    const uint32_t lanes = std::min<uint32_t>(kWarp, threads_ - n * kWarp);
    w.number = static_cast<int>(n);
    w.regs32.resize(kernel_.regs32), w.regs64.resize(kernel_.regs64);
    for (auto& r : w.regs32) r.fill(0xA5A5A5A5);
    for (auto& r : w.regs64) r.fill(0xA5A5A5A5A5A5A5A5);
    w.pc.fill(0);
    w.alive = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
    w.at_warp = w.spun = 0;
    w.barrier = w.waiting_pc = -1;
    for (auto& g : w.groups) g.clear();
    for (auto& g : w.open) g.clear();
  }
  start_clocks();
}

void Block::run(Dim index, int number) {
  index_ = index, number_ = number;
  start();
  std::vector<uint32_t> order(warps_.size());
  std::iota(order.begin(), order.end(), 0u);
  if (options_.order == kLast) std::reverse(order.begin(), order.end());
  int idle = 0;
  while (!failed_) {
    const uint64_t before = events_;
    if (!round(order)) break;
    const bool moved = events_ != before, early = options_.order == kRandom && random_() % 4 == 0;
    const bool landed = (!moved || early) && land_one();
    idle = moved || landed ? 0 : idle + 1;
    if (idle > kIdleRounds) deadlock();
  }
  if (failed_) return;
  check_flights();
  ++result_.blocks;
  result_.warps += warps_.size();
}

// A turn for every warp. False when all have ended.
bool Block::round(std::vector<uint32_t>& order) {
  if (options_.order == kRandom) std::shuffle(order.begin(), order.end(), random_);
  bool any = false;
  for (const uint32_t n : order) {
    Warp& w = warps_[n];
    if (!w.alive) continue;
    any = true;
    if (w.barrier >= 0) continue;
    if (run_warp(w) == Turn::kEnded) complete_barriers();
    if (failed_) return false;
  }
  return any;
}

void Block::deadlock() {
  for (const Warp& w : warps_) {
    if (!w.alive) continue;
    const std::string what = w.barrier >= 0 ? "waits at barrier " + std::to_string(w.barrier)
                                            : "waits for an mbarrier";
    stop("deadlock", w.waiting_pc, w.number * kWarp, what);
  }
}

Turn Block::run_warp(Warp& w) {
  w.spun = 0;
  for (;;) {
    if (failed_ || !w.alive) return Turn::kEnded;
    if (w.barrier >= 0) return Turn::kBlocked;
    const uint32_t runnable = w.alive & ~w.at_warp & ~w.spun;
    if (!runnable) {
      if (w.spun) return Turn::kYielded;
      if (!converge(w)) return Turn::kEnded;
      continue;
    }
    uint32_t pc = ~0u, next = ~0u, mask = 0;
    for (int l = 0; l < kWarp; ++l) {
      if (runnable >> l & 1) pc = std::min(pc, w.pc[static_cast<size_t>(l)]);
    }
    for (int l = 0; l < kWarp; ++l) {
      if (!(runnable >> l & 1)) continue;
      if (w.pc[static_cast<size_t>(l)] == pc) mask |= 1u << l;
      else next = std::min(next, w.pc[static_cast<size_t>(l)]);
    }
    run_lanes(w, pc, next, mask);
  }
}

// All threads of the warp wait for each other: at one instruction, or it is an error.
bool Block::converge(Warp& w) {
  const uint32_t pc = w.pc[static_cast<size_t>(__builtin_ctz(w.alive))];
  bool same = true, barriers = true;
  for (size_t l = 0; l < kWarp; ++l) {
    if (!(w.alive >> l & 1)) continue;
    same = same && w.pc[l] == pc;
    barriers = barriers && kernel_.code[w.pc[l]].op == BAR_WARP;
  }
  if (!same && !barriers) {
    stop("threads of a warp wait at different instructions", static_cast<int>(pc),
         w.number * kWarp, kernel_.code[pc].text);
    return false;
  }
  w.at_warp = 0;
  for (size_t l = 0; l < kWarp; ++l) if (w.alive >> l & 1) ++w.pc[l];
  together(w, static_cast<int>(pc));
  return !failed_;
}

void Block::together(Warp& w, int pc) {
  const Instruction& i = kernel_.code[static_cast<size_t>(pc)];
  Count& count = result_.counts[static_cast<size_t>(pc)];
  ++count.warps;
  count.lanes += static_cast<uint64_t>(__builtin_popcount(w.alive));
  if (w.alive != kAllLanes && (i.op == MMA || i.op == LDMATRIX)) {
    find("a warp's instruction after some of its threads have ended", pc, -1, w.number * kWarp,
         i.text);
  }
  switch (i.op) {
    case BAR_WARP: return sync_lanes(w);
    case BAR_SYNC: case BAR_ARRIVE: return barrier(w, i, pc);
    case SHFL: return shuffle(w, i, pc);
    case VOTE: return vote(w, i);
    case ELECT: return elect(w, i);
    case REDUX: return reduce(w, i);
    case LDMATRIX: return load_matrices(w, i, pc);
    default: return multiply_add(w, i);
  }
}

static void leave(Warp& w, uint32_t mask, uint32_t pc) {
  for (size_t l = 0; l < kWarp; ++l) if (mask >> l & 1) w.pc[l] = pc;
}

uint32_t Block::guarded(const Warp& w, const Instruction& i, uint32_t mask) const {
  if (i.guard.kind == Operand::kSink) return mask;
  const Words& p = w.regs32[i.guard.index];
  uint32_t on = 0;
  for (size_t l = 0; l < kWarp; ++l) on |= (p[l] & 1) << l;
  return mask & (i.guard.negated ? ~on : on);
}

// Threads that are at one place, until they part or come where others are.
void Block::run_lanes(Warp& w, uint32_t pc, uint32_t next, uint32_t mask) {
  while (!failed_) {
    if (pc >= next) return leave(w, mask, pc);
    const Instruction& i = kernel_.code[pc];
    if (is_collective(i.op)) {
      if (i.guard.kind != Operand::kSink) {
        return stop("a warp's instruction under a predicate", static_cast<int>(pc),
                    w.number * kWarp, i.text);
      }
      leave(w, mask, pc);
      if (mask != w.alive) {
        w.at_warp |= mask;
        return;
      }
      leave(w, mask, ++pc);
      together(w, static_cast<int>(pc) - 1);
      if (w.barrier >= 0) return;
      continue;
    }
    const uint32_t active = guarded(w, i, mask);
    Count& count = result_.counts[pc];
    ++count.warps;
    count.lanes += static_cast<uint64_t>(__builtin_popcount(active));
    if (i.op == BRA || i.op == RET) {
      if (!branch(w, i, active, mask, pc)) return;
      continue;
    }
    if (active && !execute(w, i, active, mask, static_cast<int>(pc))) {
      return leave(w, mask, pc + 1);
    }
    ++pc;
  }
}

// False if the threads do not go on together from `pc`.
bool Block::branch(Warp& w, const Instruction& i, uint32_t active, uint32_t& mask, uint32_t& pc) {
  if (i.op == RET) {
    end_lanes(w, active, static_cast<int>(pc));
    mask &= ~active;
    ++pc;
    return mask != 0;
  }
  if (active != mask && active != 0) {
    leave(w, active, i.target);
    leave(w, mask & ~active, pc + 1);
    return false;
  }
  pc = active ? i.target : pc + 1;
  return true;
}

void Block::end_lanes(Warp& w, uint32_t mask, int pc) {
  for (size_t l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    bool any = !w.open[l].empty();
    for (const auto& g : w.groups[l]) any = any || !g.empty();
    if (any) {
      const int thread = w.number * kWarp + static_cast<int>(l);
      find("asynchronous copy under way, at the end", pc, -1, thread, "");
    }
  }
  w.alive &= ~mask;
  if (mask) ++events_;
}

// After an arrival others may have their turn: then a ring of slots is full or empty at times.
bool Block::goes_on(Warp& w, uint32_t mask) {
  const bool yields = options_.order == kLast || (options_.order == kRandom && random_() % 2);
  if (yields) w.spun |= mask;
  return !yields;
}

// False if the warp's threads have to wait.
bool Block::execute(Warp& w, const Instruction& i, uint32_t active, uint32_t mask, int pc) {
  switch (i.op) {
    case LD: case ST: load_store(w, i, active, pc); return true;
    case ATOM: atomic(w, i, active, pc); return true;
    case CP_ASYNC: copy_start(w, i, active, pc); return true;
    case CP_COMMIT: copies_commit(w, active); return true;
    case CP_WAIT: copies_wait(w, active, i); return true;
    case CP_ARRIVE: copies_arrive(w, i, active, pc); return goes_on(w, mask);
    case CP_BULK: bulk_start(w, i, active, pc); return true;
    case MBAR_INIT: case MBAR_INVAL: mbarrier_init(w, i, active, pc); return true;
    case MBAR_ARRIVE: case MBAR_EXPECT:
      mbarrier_arrive(w, i, active, pc);
      return goes_on(w, mask);
    case MBAR_WAIT:
      if (mbarrier_wait(w, i, active, pc)) return true;
      w.spun |= mask, w.waiting_pc = pc;
      return false;
    case NOP: return true;
    case ACTIVEMASK: {
      Lanes all;
      all.fill(active);
      store(w, i.to[0], all, active);
      return true;
    }
    case TRAP:
      result_.trapped = true;
      stop("trap", pc, w.number * kWarp + __builtin_ctz(active), "");
      return true;
    default:
      try {
        compute(w, i, active);
      } catch (const PtxError& error) {
        stop(error.what(), pc, w.number * kWarp, i.text);
      }
      return true;
  }
}

void run_grid(const Kernel& kernel, Dim grid, uint32_t threads, uint32_t dynamic_shared,
              const std::vector<uint8_t>& params, const Options& options, Result& result) {
  std::lock_guard<std::mutex> guard(global_lock());
  next_launch();
  ++result.launches;
  result.counts.resize(kernel.code.size());
  const uint32_t fixed = dynamic_shared ? (kernel.static_shared + 15) / 16 * 16
                                        : kernel.static_shared;
  Block block(kernel, grid, threads, fixed + dynamic_shared, params, options, result);
  int number = 0;
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; ++y) {
      for (uint32_t x = 0; x < grid.x; ++x) {
        block.run({x, y, z}, number++);
        if (block.failed()) return;
      }
    }
  }
}

std::string place(const Kernel& kernel, int pc) {
  if (pc < 0) return "";
  std::string text;
  int loc = kernel.code[static_cast<size_t>(pc)].loc;
  while (loc >= 0) {
    const Loc& l = kernel.locs[static_cast<size_t>(loc)];
    const auto file = kernel.files.find(l.file);
    std::string name = file == kernel.files.end() ? "?" : file->second;
    name = name.substr(name.rfind('/') + 1);
    text += (text.empty() ? "" : " < ") + name + ":" + std::to_string(l.line);
    loc = l.parent;
  }
  return text;
}

}  // namespace ptxsim
