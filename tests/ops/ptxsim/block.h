// A block of threads under execution. Its methods are in the files named above them.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "clocks.h"
#include "global.h"
#include "machine.h"
#include "shadow.h"

namespace ptxsim {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr uint64_t kSharedWindow = 1ull << 60;  // generic addresses of shared memory

using Lanes = std::array<uint64_t, kWarp>;   // a value of each thread of a warp
using Words = std::array<uint32_t, kWarp>;

struct Copy {  // cp.async of one thread
  uint32_t to;
  uint64_t from;
  uint32_t size, source_size;
  int pc;
};

struct Warp {
  int number = 0;
  std::vector<Words> regs32;
  std::vector<Lanes> regs64;
  Words pc{};
  uint32_t alive = 0;      // threads that have not ended
  uint32_t at_warp = 0;    // those that wait for the rest of the warp
  uint32_t spun = 0;       // those whose wait on an mbarrier failed in this turn
  int barrier = -1;        // the bar.sync that it waits at
  int waiting_pc = -1;     // the last wait on an mbarrier that failed, or bar.sync
  // Order. What all lanes have synchronised with, and what single lanes have since then.
  VectorClock clock;
  std::array<std::unique_ptr<VectorClock>, kWarp> lane_clock;
  uint32_t alone = 0;      // lanes that have a clock of their own
  Time now = 1;
  uint32_t synced = 0;     // accesses from this number on are later than the last bar.warp.sync
  std::vector<Time> floor; // by warp: the least that `clock` has seen of its threads
  std::vector<std::pair<Time, uint32_t>> access_at;  // by pc: the latest access's time, number
  // Asynchronous copies: groups by thread, and what is not committed yet.
  std::array<std::deque<std::vector<Copy>>, kWarp> groups;
  std::array<std::vector<Copy>, kWarp> open;
};

struct Mbarrier {
  bool live = false;
  uint32_t expected = 0, pending = 0;  // arrivals
  int64_t bytes = 0;                   // of copies: expected, less those that landed
  uint64_t phase = 0;
  uint32_t agent = 0;                  // of its bulk copies
  VectorClock arriving, completed;     // what this phase's arrivals release; the last phase's
};

struct NamedBarrier {
  uint32_t arrived = 0, needed = 0;  // warps; needed 0: all that have not ended
  VectorClock clock;
};

// Copies whose landing an mbarrier tracks: a warp's cp.async.mbarrier.arrive, or bulk copies.
struct Flight {
  int warp, pc;
  bool bulk = false;
  uint32_t lanes = 0;
  std::array<std::vector<Copy>, kWarp> copies;
  std::array<uint32_t, kWarp> barrier{};  // addresses
};

enum class Turn { kEnded, kBlocked, kYielded };

class Block {
 public:
  Block(const Kernel& kernel, Dim grid, uint32_t threads, uint32_t shared_bytes,
        const std::vector<uint8_t>& params, const Options& options, Result& result);
  void run(Dim index, int number);
  bool failed() const { return failed_; }

 private:
  const Kernel& kernel_;
  const Dim grid_;
  const uint32_t threads_, shared_bytes_;
  const std::vector<uint8_t>& params_;
  const Options& options_;
  Result& result_;
  Dim index_{};
  int number_ = 0;
  bool failed_ = false;
  std::vector<uint8_t> shared_;
  SharedShadow shadow_;
  std::vector<Warp> warps_;
  Time time_ = 1;
  uint64_t events_ = 0;  // counts what lets a waiting warp go on
  std::map<uint32_t, Mbarrier> mbarriers_;
  uint32_t mbarrier_agents_ = 0;
  std::map<int, NamedBarrier> barriers_;
  std::deque<Flight> flights_;
  std::set<uint32_t> tracked_;  // agents whose copies have landed for an mbarrier
  std::mt19937_64 random_;
  Allocation* last_ = nullptr;  // that was touched

  // control.cpp
  void start();
  void stop(const char* kind, int pc, int thread, const std::string& more);
  bool round(std::vector<uint32_t>& order);
  void deadlock();
  Turn run_warp(Warp& w);
  bool converge(Warp& w);
  void run_lanes(Warp& w, uint32_t pc, uint32_t next, uint32_t mask);
  bool branch(Warp& w, const Instruction& i, uint32_t active, uint32_t& mask, uint32_t& pc);
  bool execute(Warp& w, const Instruction& i, uint32_t active, uint32_t mask, int pc);
  bool goes_on(Warp& w, uint32_t mask);
  void end_lanes(Warp& w, uint32_t mask, int pc);
  void together(Warp& w, int pc);
  uint32_t guarded(const Warp& w, const Instruction& i, uint32_t mask) const;

  // order.cpp: barriers of threads, and their clocks
  void start_clocks();
  uint32_t warp_count() const { return static_cast<uint32_t>(warps_.size()); }
  uint32_t copies_of(int warp) const { return (warp_count() + static_cast<uint32_t>(warp)) * 32; }
  void sync_lanes(Warp& w);
  void refresh_floor(Warp& w);
  void release(Warp& w, uint32_t lanes, VectorClock& into);
  void acquire(Warp& w, uint32_t lanes, const VectorClock& from);
  bool ordered(const Warp& w, int lane, uint32_t agent, Time time) const;
  void barrier(Warp& w, const Instruction& i, int pc);
  void complete_barriers();

  // shared.cpp, global.cpp, memory.cpp: accesses and their checks
  void find(const char* kind, int pc, int other, int thread, const std::string& more);
  void race(const char* what, int pc, int other, int thread, uint32_t agent, uint64_t address);
  bool shared_access(Warp& w, int lane, uint32_t address, uint32_t bytes, int pc, bool write);
  bool in_shared(Warp& w, int lane, uint32_t address, uint32_t bytes, int pc, bool write);
  bool both_atomic(int pc, int other) const;
  uint32_t access_of(Warp& w, int pc);
  void check_state(Warp& w, int lane, uint32_t cell, int pc, bool write);
  void read_cell(Warp& w, int lane, uint32_t cell, int pc);
  void note_read(Warp& w, uint32_t lanes, uint32_t cell, uint32_t access);
  void write_cell(Warp& w, int lane, uint32_t cell, uint32_t access, int pc);
  void read_row(Warp& w, uint32_t cell, const uint32_t* lanes, uint32_t access);
  bool global_access(Warp& w, int lane, uint64_t address, uint32_t bytes, int pc, bool write);
  void global_bounds(uint64_t address, uint32_t bytes, int pc, int thread, bool write);
  void touch(Touch& t, Warp& w, int lane, int pc, bool write, uint64_t offset);
  void touch_read(Touch& t, const Warp& w, int lane, int pc);
  void touch_write(Touch& t, const Warp& w, int lane, int pc, uint64_t offset);
  int unordered_reader(const Touch& t, const Warp& w, int lane) const;
  void check_global(Warp& w, int lane, uint64_t offset, uint32_t bytes, int pc, bool write);
  void uninitialised(const Touch& t, uint64_t offset, int pc, int thread);
  void load_store(Warp& w, const Instruction& i, uint32_t mask, int pc);
  uint8_t* locate(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, int pc,
                  bool write);
  void atomic(Warp& w, const Instruction& i, uint32_t mask, int pc);

  // async.cpp
  void copy_start(Warp& w, const Instruction& i, uint32_t mask, int pc);
  bool copy_check(Warp& w, int lane, const Copy& c);
  void copy_under_way(Warp& w, int lane, const Copy& c);
  void land(const Copy& c, uint32_t access, int lane);
  void copies_commit(Warp& w, uint32_t mask);
  void copies_wait(Warp& w, uint32_t mask, const Instruction& i);
  void copies_arrive(Warp& w, const Instruction& i, uint32_t mask, int pc);
  void bulk_start(Warp& w, const Instruction& i, uint32_t mask, int pc);
  bool land_one();
  void land_flight(size_t which);
  void check_flights();

  // mbarrier.cpp
  Mbarrier* mbarrier_at(Warp& w, int lane, uint64_t address, int pc);
  void mbarrier_init(Warp& w, const Instruction& i, uint32_t mask, int pc);
  void mbarrier_arrive(Warp& w, const Instruction& i, uint32_t mask, int pc);
  bool mbarrier_wait(Warp& w, const Instruction& i, uint32_t mask, int pc);
  void arrive(Mbarrier& b, uint32_t count, int pc, int thread);
  void complete_phase(Mbarrier& b);

  // compute.cpp, registers.cpp
  void compute(Warp& w, const Instruction& i, uint32_t mask);
  void compute_lanes(Warp& w, const Instruction& i, uint32_t mask);
  void pack(Warp& w, const Instruction& i, uint32_t mask);
  bool quick32(Warp& w, const Instruction& i, uint32_t mask);
  void fetch(const Warp& w, const Operand& o, Lanes& to) const;
  void fetch_address(const Warp& w, const Operand& o, Lanes& to) const;
  const uint32_t* view32(const Warp& w, const Operand& o, Words& scratch) const;
  uint64_t special(const Warp& w, uint32_t which, int lane) const;
  void store(Warp& w, const Operand& o, const Lanes& from, uint32_t mask);

  // tensor.cpp, warp.cpp: instructions of a whole warp
  void load_matrices(Warp& w, const Instruction& i, int pc);
  void multiply_add(Warp& w, const Instruction& i);
  void shuffle(Warp& w, const Instruction& i, int pc);
  void vote(Warp& w, const Instruction& i);
  void elect(Warp& w, const Instruction& i);
  void reduce(Warp& w, const Instruction& i);
};

// counts.cpp
uint64_t wavefronts(const Lanes& addresses, uint32_t mask, uint32_t bytes, uint64_t& ideal);
uint64_t sectors(const Lanes& addresses, uint32_t mask, uint32_t bytes);

// arithmetic.cpp: of one thread; throws PtxError on what it does not know
uint64_t arithmetic(const Instruction& i, uint64_t a, uint64_t b, uint64_t c, uint64_t d);
uint64_t convert(const Instruction& i, uint64_t x);
uint64_t reduce_two(const Instruction& i, uint64_t a, uint64_t b);

}  // namespace ptxsim
