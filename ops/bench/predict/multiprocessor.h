// Cycle model of one multiprocessor: what it is given, and what it keeps. Warps follow traces of
// executed instructions; when one may issue its next is what ptxas has encoded: stall cycles and
// scoreboards. Each of the four partitions issues one instruction a cycle, of the oldest warp that
// can.
//
// Not modelled: the instruction cache, register banks, the clock's throttling, other
// multiprocessors' share of L2 and device memory but by a constant rate.

#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <unordered_map>
#include <vector>

namespace irpe {

// What executes an instruction, in the order of cycles.py.
enum Unit {
  kNoUnit,
  kAlu,
  kFma,
  kImad,
  kMufu,
  kHmma,
  kShared,
  kLoad,
  kStore,
  kCopy,
  kLocal,
  kConstant,
  kUniform,
  kBlockBarrier,
  kBranch,
  kCopyCommit,
  kCopyWait,
  kSpecial,
  kReduce,
  kBarrierWait,
  kBarrierArrive,
  kBarrierCopy,
  kUnits
};
// What a warp waits for that cannot issue: the unit whose result it needs, or one of these.
enum Reason {
  kNotChosen = kUnits,
  kAtBlockBarrier,
  kStall,
  kHmmaPipe,
  kMufuPipe,
  kMemoryPipe,
  kOtherPipe,
  kReasons
};
enum State { kAbsent, kExecuted, kTaken, kOff };

constexpr int kPartitions = 4, kScoreboards = 6;
constexpr double kForever = 1e18;

// That of gpus.py; in cycles unless said otherwise.
struct Hardware {
  double hmma, fma, imad, alu, mufu, uniform;  // of a partition's pipe, for one instruction
  double l2_bytes, reduce_scale;               // bytes a cycle; how many bytes one reduced costs
  double shared_latency, l1_latency, l2_latency, memory_latency, constant_latency, mufu_latency;
  double hmma_latency, hmma_k8_latency, special_latency, barrier_latency;
  double taken_branch, block_barrier;
  double queue;               // how far memory instructions may be ahead of the pipe
  double l2_from, l2_to;      // addresses of what all blocks read, which L2 holds
  int32_t l1_lines, padding;  // lines of 128 bytes
};

struct Instruction {
  int32_t unit, stall, write_barrier, read_barrier, wait_mask;
  int32_t detail;  // of HMMA: 1 with k = 8; of a wait for copies: groups that may be under way
};

struct Record {  // an executed instruction, of emulator.py
  int64_t x;     // wavefronts; first line; address of an mbarrier
  int32_t y, z;  // lines, bytes; parity, lanes that arrive
  int32_t index, state;
};

struct Trace {
  const Record* records;
  int64_t count;
};

struct Barrier {
  int64_t address;
  int64_t arrivals;  // that complete a phase
};

struct Result {
  double cycles, issued;
  double busy[kUnits];     // cycles of each kind of pipe, of all partitions together
  double waits[kReasons];  // cycles that warps spend on each reason
};

struct Warp {
  const Trace* trace;
  int64_t next = 0;
  int block, partition;
  double ready;  // when its last instruction's stall is over
  double scoreboard[kScoreboards] = {};
  int owner[kScoreboards] = {};      // the unit that the scoreboard waits for
  std::deque<double> copy_groups{};  // when each lands
  double copies_landed = 0;
  bool at_block_barrier = false, done = false;

  const Record& record() const { return trace->records[next]; }
};

struct BarrierState {
  int64_t arrivals, pending;
  int phase = 0;

  void arrive(int64_t lanes) {
    pending -= lanes;
    if (pending <= 0) pending += arrivals, phase ^= 1;
  }
};

struct Block {
  int warps;  // that have not ended
  int at_barrier = 0;
  std::unordered_map<int64_t, BarrierState> barriers{};
};

struct Arrival {
  double when;
  BarrierState* at;
  int64_t lanes;
};

class Cache {  // of lines, the least recently used one goes
 public:
  explicit Cache(int lines) : lines_(lines) {}

  bool touch(int64_t line) {  // whether it was there
    const auto found = places_.find(line);
    if (found != places_.end()) {
      order_.splice(order_.begin(), order_, found->second);
      return true;
    }
    order_.push_front(line);
    places_[line] = order_.begin();
    if (static_cast<int>(places_.size()) > lines_) {
      places_.erase(order_.back());
      order_.pop_back();
    }
    return false;
  }

 private:
  int lines_;
  std::list<int64_t> order_;
  std::unordered_map<int64_t, std::list<int64_t>::iterator> places_;
};

class Multiprocessor {
 public:
  Multiprocessor(const Hardware& hardware, const Instruction* program, Result* result)
      : hw_(hardware), program_(program), l1_(hardware.l1_lines), result_(*result) {}

  void start_block(const Trace* traces, int warps, const Barrier* barriers, int num_barriers);
  bool step();  // a cycle, or several in which nothing happens; false if nothing ever will
  bool is_idle() const;
  int resident_blocks() const { return resident_; }

 private:
  struct Wait {
    int reason;  // -1: it can issue
    double until;
  };
  Wait wait_of(const Warp& warp) const;
  double pipe_free(const Warp& warp, int unit) const;
  void issue(Warp& warp);
  double execute(Warp& warp, const Instruction& x, const Record& r, double* sources_read);
  double load(const Record& r, double start);
  double start_memory(const Warp& warp, double wavefronts);
  double move_bytes(double start, double bytes);
  void arrive_at_block_barrier(Warp& warp);
  void release_block(int block);
  void end_warp(Warp& warp);

  const Hardware& hw_;
  const Instruction* program_;
  Cache l1_;
  Result& result_;
  double now_ = 0;
  // When each pipe takes its next instruction, by partition; memory's are the multiprocessor's.
  double hmma_[kPartitions] = {}, fma_[kPartitions] = {}, alu_[kPartitions] = {};
  double mufu_[kPartitions] = {}, uniform_[kPartitions] = {}, memory_issue_[kPartitions] = {};
  double memory_ = 0, l2_ = 0;
  std::deque<Warp> warps_;
  std::deque<Block> blocks_;
  std::vector<Warp*> live_[kPartitions];
  std::vector<Arrival> arrivals_;  // at mbarriers, that are under way
  int first_partition_ = 0, resident_ = 0;
};

}  // namespace irpe
