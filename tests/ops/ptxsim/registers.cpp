// Registers of a warp: what operands are worth, and where results go.
#include "block.h"

namespace ptxsim {

void Block::fetch(const Warp& w, const Operand& o, Lanes& to) const {
  switch (o.kind) {
    case Operand::kReg32: {
      const Words& from = w.regs32[o.index];
      for (size_t l = 0; l < kWarp; ++l) to[l] = from[l];
      break;
    }
    case Operand::kReg64: to = w.regs64[o.index]; break;
    case Operand::kImmediate: to.fill(o.value); break;
    case Operand::kSpecial:
      for (int l = 0; l < kWarp; ++l) to[static_cast<size_t>(l)] = special(w, o.index, l);
      break;
    default: to.fill(0);
  }
}

// A base and its constant offset.
void Block::fetch_address(const Warp& w, const Operand& o, Lanes& to) const {
  fetch(w, o, to);
  if (o.kind == Operand::kReg32) {
    for (auto& x : to) x = static_cast<uint32_t>(x + o.value);
  } else if (o.kind == Operand::kReg64) {
    for (auto& x : to) x += o.value;
  }
}

// The lower 32 bits of an operand; a 32-bit register is not copied.
const uint32_t* Block::view32(const Warp& w, const Operand& o, Words& scratch) const {
  if (o.kind == Operand::kReg32) return w.regs32[o.index].data();
  if (o.kind == Operand::kImmediate) {
    scratch.fill(static_cast<uint32_t>(o.value));
  } else {
    Lanes all;
    fetch(w, o, all);
    for (size_t l = 0; l < kWarp; ++l) scratch[l] = static_cast<uint32_t>(all[l]);
  }
  return scratch.data();
}

uint64_t Block::special(const Warp& w, uint32_t which, int lane) const {
  const uint64_t bit = uint64_t{1} << lane;
  switch (which) {
    case TID_X: return static_cast<uint64_t>(w.number * kWarp + lane);
    case NTID_X: return threads_;
    case NTID_Y: case NTID_Z: return 1;
    case CTAID_X: return index_.x;
    case CTAID_Y: return index_.y;
    case CTAID_Z: return index_.z;
    case NCTAID_X: return grid_.x;
    case NCTAID_Y: return grid_.y;
    case NCTAID_Z: return grid_.z;
    case LANEID: return static_cast<uint64_t>(lane);
    case LANEMASK_EQ: return bit;
    case LANEMASK_LT: return bit - 1;
    case LANEMASK_LE: return bit * 2 - 1;
    case LANEMASK_GT: return kAllLanes & ~(bit * 2 - 1);
    case LANEMASK_GE: return kAllLanes & ~(bit - 1);
    default: return 0;  // %tid.y and z: blocks have one dimension
  }
}

void Block::store(Warp& w, const Operand& o, const Lanes& from, uint32_t mask) {
  if (o.kind == Operand::kReg32) {
    Words& reg = w.regs32[o.index];
    if (mask == kAllLanes) {
      for (size_t l = 0; l < kWarp; ++l) reg[l] = static_cast<uint32_t>(from[l]);
      return;
    }
    for (size_t l = 0; l < kWarp; ++l) {
      if (mask >> l & 1) reg[l] = static_cast<uint32_t>(from[l]);
    }
  } else if (o.kind == Operand::kReg64) {
    Lanes& reg = w.regs64[o.index];
    for (size_t l = 0; l < kWarp; ++l) if (mask >> l & 1) reg[l] = from[l];
  }
}

}  // namespace ptxsim
