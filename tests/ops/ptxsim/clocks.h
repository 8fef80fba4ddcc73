// Happens-before by vector clocks.
//
// Time is a counter of the block; every release (an arrival at a barrier) starts a new one for the
// warp. An access carries its agent and time. It happens before what another agent does now if
// that agent's clock has seen a later time of the first. Agents are the threads; besides, the
// asynchronous copies of a thread, and the bulk copies that an mbarrier tracks: who has not waited
// for the barrier does not see these, be it the thread that started the copy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptxsim {

using Time = uint32_t;

struct VectorClock {
  std::vector<Time> seen;  // by agent: its accesses before that time are ordered

  Time of(uint32_t agent) const { return agent < seen.size() ? seen[agent] : 0; }
  void raise(uint32_t agent, Time time) {
    if (agent >= seen.size()) seen.resize(agent + 1, 0);
    seen[agent] = std::max(seen[agent], time);
  }
  void join(const VectorClock& other) {
    if (seen.size() < other.seen.size()) seen.resize(other.seen.size(), 0);
    const Time* from = other.seen.data();
    Time* to = seen.data();
    for (size_t n = 0; n < other.seen.size(); ++n) to[n] = std::max(to[n], from[n]);
  }
};

}  // namespace ptxsim
