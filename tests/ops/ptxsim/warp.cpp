// Exchanges between the threads of a warp. None of them orders accesses to memory.
#include "block.h"
#include "values.h"

namespace ptxsim {

void Block::shuffle(Warp& w, const Instruction& i, int pc) {
  Lanes a, b, c, members, d{}, p{};
  fetch(w, i.in[0], a), fetch(w, i.in[1], b), fetch(w, i.in[2], c), fetch(w, i.in[3], members);
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    if (!(w.alive >> lane & 1)) continue;
    const int thread = w.number * kWarp + static_cast<int>(lane);
    if (!(members[lane] >> lane & 1)) {
      find("shfl.sync by a lane that its mask leaves out", pc, -1, thread, "");
    }
    const uint32_t value = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int64_t least = lane & segment, most = (lane & segment) | (clamp & ~segment);
    int64_t from = 0;
    switch (i.mode) {
      case SHFL_BFLY: from = lane ^ value; break;
      case SHFL_IDX: from = least | (value & ~segment); break;
      case SHFL_UP: from = int64_t{lane} - value; break;
      default: from = lane + value;
    }
    const bool inside = i.mode == SHFL_UP ? from >= most : from <= most;
    if (!inside) from = lane;
    if (!(w.alive >> from & 1)) find("shfl.sync from a lane that has ended", pc, -1, thread, "");
    d[lane] = a[static_cast<size_t>(from)], p[lane] = inside;
  }
  store(w, i.to[0], d, w.alive);
  if (i.to.size() > 1) store(w, i.to[1], p, w.alive);
}

void Block::vote(Warp& w, const Instruction& i) {
  Lanes a, r;
  fetch(w, i.in[0], a);
  uint32_t yes = 0;
  for (size_t l = 0; l < kWarp; ++l) {
    yes |= static_cast<uint32_t>((a[l] & 1) != i.in[0].negated) << l;
  }
  yes &= w.alive;
  const bool all = yes == w.alive, any = yes != 0;
  r.fill(i.mode == VOTE_BALLOT ? yes : i.mode == VOTE_ANY ? any : i.mode == VOTE_ALL ? all
                                                                  : all || !any);
  store(w, i.to[0], r, w.alive);
}

void Block::elect(Warp& w, const Instruction& i) {
  Lanes leader, is_leader{};
  const auto lane = static_cast<size_t>(__builtin_ctz(w.alive));
  leader.fill(lane);
  is_leader[lane] = 1;
  store(w, i.to[0], leader, w.alive);
  if (i.to.size() > 1) store(w, i.to[1], is_leader, w.alive);
}

void Block::reduce(Warp& w, const Instruction& i) {
  Lanes a, r;
  fetch(w, i.in[0], a);
  const int first = __builtin_ctz(w.alive);
  uint64_t sum = a[static_cast<size_t>(first)];
  for (int l = first + 1; l < kWarp; ++l) {
    if (w.alive >> l & 1) sum = reduce_two(i, sum, a[static_cast<size_t>(l)]);
  }
  r.fill(sum);
  store(w, i.to[0], r, w.alive);
}

}  // namespace ptxsim
