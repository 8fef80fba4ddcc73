// Cycle model of one multiprocessor: a cycle after the other.

#include "multiprocessor.h"

#include <algorithm>
#include <cmath>

namespace irpe {

void Multiprocessor::start_block(const Trace* traces, int warps, const Barrier* barriers,
                                 int num_barriers) {
  const int block = static_cast<int>(blocks_.size());
  blocks_.push_back({warps});
  for (int n = 0; n < num_barriers; ++n) {
    blocks_.back().barriers[barriers[n].address] = {barriers[n].arrivals, barriers[n].arrivals};
  }
  for (int w = 0; w < warps; ++w) {
    const int partition = (w + (warps % kPartitions ? first_partition_ : 0)) % kPartitions;
    warps_.push_back(
        {.trace = traces + w, .block = block, .partition = partition, .ready = now_ + 20});
    live_[partition].push_back(&warps_.back());
  }
  first_partition_ = (first_partition_ + warps) % kPartitions;
  ++resident_;
}

bool Multiprocessor::is_idle() const {
  return std::all_of(live_, live_ + kPartitions, [](const auto& warps) { return warps.empty(); });
}

bool Multiprocessor::step() {
  for (size_t n = 0; n < arrivals_.size();) {
    if (arrivals_[n].when > now_) {
      ++n;
      continue;
    }
    arrivals_[n].at->arrive(arrivals_[n].lanes);
    arrivals_[n] = arrivals_.back();
    arrivals_.pop_back();
  }
  double soonest = kForever, waits[kReasons] = {};
  for (const Arrival& each : arrivals_) soonest = std::min(soonest, each.when);
  for (std::vector<Warp*>& warps : live_) {
    Warp* chosen = nullptr;
    for (Warp* warp : warps) {
      const Wait wait = wait_of(*warp);
      if (wait.reason >= 0) {
        ++waits[wait.reason];
        soonest = std::min(soonest, wait.until);
      } else if (chosen == nullptr) {
        chosen = warp;
      } else {
        ++waits[kNotChosen];
      }
    }
    if (chosen != nullptr) {
      issue(*chosen);
      soonest = std::min(soonest, now_ + 1);
    }
  }
  if (soonest >= kForever) return false;
  const double next = std::ceil(std::max(now_ + 1, soonest));
  for (int n = 0; n < kReasons; ++n) result_.waits[n] += waits[n] * (next - now_);
  now_ = next;
  result_.cycles = now_;
  return true;
}

Multiprocessor::Wait Multiprocessor::wait_of(const Warp& warp) const {
  if (warp.at_block_barrier) return {kAtBlockBarrier, kForever};
  const Record& r = warp.record();
  const Instruction& x = program_[r.index];
  double until = 0;
  int owner = 0;
  for (int n = 0; n < kScoreboards; ++n) {
    if (x.wait_mask >> n & 1 && warp.scoreboard[n] > until) {
      until = warp.scoreboard[n];
      owner = warp.owner[n];
    }
  }
  if (until > std::max(now_, warp.ready)) return {owner, until};
  if (warp.ready > now_) return {kStall, warp.ready};
  if (x.unit == kCopyWait && static_cast<int>(warp.copy_groups.size()) > x.detail) {
    const double landed = warp.copy_groups[warp.copy_groups.size() - 1 - x.detail];
    if (landed > now_) return {kCopyWait, landed};
  }
  if (r.state == kOff) return {-1, 0};
  if (x.unit == kBarrierWait && blocks_[warp.block].barriers.at(r.x).phase == (r.y & 1)) {
    return {kBarrierWait, kForever};
  }
  const double free = pipe_free(warp, x.unit);
  if (free <= now_) return {-1, 0};
  switch (x.unit) {
    case kHmma:
      return {kHmmaPipe, free};
    case kMufu:
      return {kMufuPipe, free};
    case kAlu:
    case kFma:
    case kImad:
      return {kOtherPipe, free};
    default:
      return {kMemoryPipe, free};
  }
}

// When a unit can take an instruction; some have a queue.
double Multiprocessor::pipe_free(const Warp& warp, int unit) const {
  const int p = warp.partition;
  switch (unit) {
    case kHmma:
      return hmma_[p];
    case kFma:
    case kImad:
      return fma_[p] - 0.99;
    case kAlu:
      return alu_[p] - 0.99;
    case kMufu:
      return mufu_[p] - 1.5 * hw_.mufu;
    case kShared:
    case kLoad:
    case kStore:
    case kCopy:
    case kLocal:
    case kReduce:
      return std::max(memory_ - hw_.queue, memory_issue_[p]);
    default:
      return 0;
  }
}

void Multiprocessor::issue(Warp& warp) {
  const Record& r = warp.record();
  const Instruction& x = program_[r.index];
  ++result_.issued;
  double sources_read = now_ + 4, done = now_ + 4;
  const bool is_off = r.state == kOff;
  if (!is_off) done = execute(warp, x, r, &sources_read);
  if (x.unit == kCopyCommit) {
    warp.copy_groups.push_back(warp.copies_landed);
    if (warp.copy_groups.size() > 8) warp.copy_groups.pop_front();
  } else if (x.write_barrier < kScoreboards &&
             (!is_off || x.unit == kConstant || x.unit == kSpecial)) {
    warp.scoreboard[x.write_barrier] = std::max(warp.scoreboard[x.write_barrier], done);
    warp.owner[x.write_barrier] = x.unit;
  }
  if (x.read_barrier < kScoreboards && sources_read > warp.scoreboard[x.read_barrier]) {
    warp.scoreboard[x.read_barrier] = sources_read;
    warp.owner[x.read_barrier] = x.unit;
  }
  warp.ready = now_ + std::max(1, x.stall);
  if (x.unit == kBranch && r.state == kTaken) warp.ready += hw_.taken_branch;
  if (x.unit == kBlockBarrier) arrive_at_block_barrier(warp);
  if (++warp.next == warp.trace->count) end_warp(warp);
}

// Occupies the units; returns when the result is there.
double Multiprocessor::execute(Warp& warp, const Instruction& x, const Record& r,
                               double* sources_read) {
  const int p = warp.partition;
  const auto occupy = [&](double& free, double cycles, int unit) {
    const double start = std::max(free, now_);
    free = start + cycles;
    result_.busy[unit] += cycles;
    return start;
  };
  switch (x.unit) {
    case kHmma:
      occupy(hmma_[p], x.detail ? hw_.hmma / 2 : hw_.hmma, kHmma);
      return now_ + (x.detail ? hw_.hmma_k8_latency : hw_.hmma_latency);
    case kFma:
      occupy(fma_[p], hw_.fma, kFma);
      break;
    case kImad:
      occupy(fma_[p], hw_.imad, kFma);
      break;
    case kAlu:
      occupy(alu_[p], hw_.alu, kAlu);
      break;
    case kUniform:
      occupy(uniform_[p], hw_.uniform, kUniform);
      break;
    case kMufu: {
      const double start = occupy(mufu_[p], hw_.mufu, kMufu);
      *sources_read = start + 6;
      return start + hw_.mufu_latency;
    }
    case kShared:
    case kLocal: {
      const double wavefronts = std::max(1.0, static_cast<double>(r.x));
      const double start = start_memory(warp, wavefronts);
      *sources_read = start + wavefronts + 8;
      return start + wavefronts + (x.unit == kShared ? hw_.shared_latency : hw_.l1_latency);
    }
    case kLoad: {
      const double start = start_memory(warp, std::max(1, r.y));
      *sources_read = start + r.y + 8;
      return load(r, start);
    }
    case kStore: {
      const double start = start_memory(warp, std::max(1, r.y));
      move_bytes(start, r.z);
      return *sources_read = start + r.y + 8;
    }
    case kReduce: {
      const double start = start_memory(warp, std::max(1, r.y));
      const double begun = move_bytes(start, r.z * hw_.reduce_scale);
      return *sources_read = std::max(start + r.y + 8, begun - 600);  // what is under way at most
    }
    case kCopy: {
      const double start = start_memory(warp, 4);
      const double landed =
          std::max(move_bytes(start, r.z) + r.z / hw_.l2_bytes, start + hw_.memory_latency);
      warp.copies_landed = std::max(warp.copies_landed, landed);
      *sources_read = start + 12;
      return landed;
    }
    case kBarrierWait:
      return now_ + hw_.barrier_latency;
    case kBarrierArrive:
    case kBarrierCopy: {
      const double when = x.unit == kBarrierCopy ? warp.copies_landed : 0;
      arrivals_.push_back(
          {std::max(now_ + hw_.barrier_latency, when), &blocks_[warp.block].barriers.at(r.x), r.z});
      break;
    }
    case kConstant:
      *sources_read = now_ + 8;
      return now_ + hw_.constant_latency;
    case kSpecial:
      return now_ + hw_.special_latency;
  }
  return now_ + 4;
}

// The pipe of shared memory and L1, which all partitions share.
double Multiprocessor::start_memory(const Warp& warp, double wavefronts) {
  const double start = std::max(memory_, now_);
  memory_ = start + wavefronts;
  memory_issue_[warp.partition] = now_ + 2;
  result_.busy[kShared] += wavefronts;
  return start;
}

// This multiprocessor's share of L2: when it begins to move these bytes.
double Multiprocessor::move_bytes(double start, double bytes) {
  const double begun = std::max(l2_, start);
  l2_ = begun + bytes / hw_.l2_bytes;
  result_.busy[kLoad] += bytes / hw_.l2_bytes;
  return begun;
}

double Multiprocessor::load(const Record& r, double start) {
  bool hit = true;
  for (int n = 0; n < r.y; ++n) hit &= l1_.touch(r.x + n);
  if (hit) return start + hw_.l1_latency + r.y;
  const double address = static_cast<double>(r.x) * 128;
  const bool in_l2 = hw_.l2_from <= address && address < hw_.l2_to;
  return std::max(move_bytes(start, r.z) + r.z / hw_.l2_bytes,
                  start + (in_l2 ? hw_.l2_latency : hw_.memory_latency));
}

void Multiprocessor::arrive_at_block_barrier(Warp& warp) {
  Block& block = blocks_[warp.block];
  warp.at_block_barrier = true;
  if (++block.at_barrier >= block.warps) release_block(warp.block);
}

void Multiprocessor::release_block(int block) {
  blocks_[block].at_barrier = 0;
  for (Warp& warp : warps_) {
    if (warp.block != block || warp.done) continue;
    warp.at_block_barrier = false;
    warp.ready = std::max(warp.ready, now_ + hw_.block_barrier);
  }
}

void Multiprocessor::end_warp(Warp& warp) {
  warp.done = true;
  std::vector<Warp*>& live = live_[warp.partition];
  live.erase(std::find(live.begin(), live.end(), &warp));
  Block& block = blocks_[warp.block];
  if (--block.warps == 0) {
    --resident_;
  } else if (block.at_barrier >= block.warps) {
    release_block(warp.block);
  }
}

// Runs blocks to their end, so many at a time; traces are those of all blocks' warps in order.
// Returns whether they end: they do not if a barrier is never completed.
extern "C" int simulate(const Hardware* hardware, const Instruction* program, const Trace* traces,
                        int num_blocks, int warps, int resident, const Barrier* barriers,
                        int num_barriers, Result* result) {
  *result = {};
  Multiprocessor multiprocessor(*hardware, program, result);
  int started = 0;
  while (true) {
    while (started < num_blocks && multiprocessor.resident_blocks() < resident) {
      multiprocessor.start_block(traces + static_cast<int64_t>(started++) * warps, warps, barriers,
                                 num_barriers);
    }
    if (multiprocessor.is_idle()) return 1;
    if (!multiprocessor.step()) return 0;
  }
}

}  // namespace irpe
