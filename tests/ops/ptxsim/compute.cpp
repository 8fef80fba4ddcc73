// Instructions on registers, for the 32 threads of a warp. The operations: arithmetic.cpp.
#include <algorithm>

#include "block.h"
#include "values.h"

namespace ptxsim {

// What is most frequent, on 32-bit registers without copies.
template <typename F>
static void each(uint32_t* to, uint32_t mask, F f) {
  if (mask == kAllLanes) {
    for (size_t l = 0; l < kWarp; ++l) to[l] = f(l);
    return;
  }
  for (size_t l = 0; l < kWarp; ++l) if (mask >> l & 1) to[l] = f(l);
}

// Ordered comparisons: false if one side is not a number.
template <typename T>
static bool compare32(uint32_t* to, uint32_t mask, Compare c, const uint32_t* a,
                      const uint32_t* b) {
  const auto x = [=](size_t l) { return bits<T>(a[l]); };
  const auto y = [=](size_t l) { return bits<T>(b[l]); };
  switch (c) {
    case EQ: return each(to, mask, [=](size_t l) { return x(l) == y(l); }), true;
    case NE: return each(to, mask, [=](size_t l) { return x(l) < y(l) || x(l) > y(l); }), true;
    case LT: return each(to, mask, [=](size_t l) { return x(l) < y(l); }), true;
    case LE: return each(to, mask, [=](size_t l) { return x(l) <= y(l); }), true;
    case GT: return each(to, mask, [=](size_t l) { return x(l) > y(l); }), true;
    case GE: return each(to, mask, [=](size_t l) { return x(l) >= y(l); }), true;
    default: return false;
  }
}

static bool quick_float(uint32_t* to, uint32_t mask, Op op, const uint32_t* a, const uint32_t* b,
                        const uint32_t* c) {
  const auto x = [=](size_t l) { return bits<float>(a[l]); };
  const auto y = [=](size_t l) { return bits<float>(b[l]); };
  const auto z = [=](size_t l) { return bits<float>(c[l]); };
  switch (op) {
    case ADD: return each(to, mask, [=](size_t l) { return f32(x(l) + y(l)); }), true;
    case SUB: return each(to, mask, [=](size_t l) { return f32(x(l) - y(l)); }), true;
    case MUL_LO: return each(to, mask, [=](size_t l) { return f32(x(l) * y(l)); }), true;
    case FMA:
      return each(to, mask, [=](size_t l) { return f32(std::fma(x(l), y(l), z(l))); }), true;
    case NEG: return each(to, mask, [=](size_t l) { return f32(-x(l)); }), true;
    default: return false;
  }
}

static bool quick_integer(uint32_t* to, uint32_t mask, const Instruction& i, const uint32_t* a,
                          const uint32_t* b, const uint32_t* c) {
  switch (i.op) {
    case ADD: return each(to, mask, [=](size_t l) { return a[l] + b[l]; }), true;
    case SUB: return each(to, mask, [=](size_t l) { return a[l] - b[l]; }), true;
    case MUL_LO: return each(to, mask, [=](size_t l) { return a[l] * b[l]; }), true;
    case MAD_LO: return each(to, mask, [=](size_t l) { return a[l] * b[l] + c[l]; }), true;
    case AND: return each(to, mask, [=](size_t l) { return a[l] & b[l]; }), true;
    case OR: return each(to, mask, [=](size_t l) { return a[l] | b[l]; }), true;
    case XOR: return each(to, mask, [=](size_t l) { return a[l] ^ b[l]; }), true;
    case SHL: return each(to, mask, [=](size_t l) { return b[l] > 31 ? 0 : a[l] << b[l]; }), true;
    case SHR:
      if (i.type == S32) {
        const auto shift = [=](size_t l) {
          return static_cast<uint32_t>(static_cast<int32_t>(a[l]) >> std::min(b[l], 31u));
        };
        return each(to, mask, shift), true;
      }
      return each(to, mask, [=](size_t l) { return b[l] > 31 ? 0 : a[l] >> b[l]; }), true;
    default: return false;
  }
}

bool Block::quick32(Warp& w, const Instruction& i, uint32_t mask) {
  const Type t = i.type;
  if (size_of(t) != 4 || i.to[0].kind != Operand::kReg32 || i.ftz || i.saturate ||
      i.in.size() > 3) {
    return false;
  }
  if (i.op == CVT) return false;
  Words scratch[3];
  const uint32_t* in[3] = {nullptr, nullptr, nullptr};
  for (size_t n = 0; n < i.in.size(); ++n) in[n] = view32(w, i.in[n], scratch[n]);
  const uint32_t *a = in[0], *b = in[1], *c = in[2];
  uint32_t* to = w.regs32[i.to[0].index].data();
  const bool integer = t == U32 || t == S32 || t == B32;
  if (i.op == MOV) return each(to, mask, [=](size_t l) { return a[l]; }), true;
  if (i.op == SELP) {
    const uint32_t flip = i.in[2].negated;
    const auto choose = [=](size_t l) { return ((c[l] & 1) ^ flip) != 0 ? a[l] : b[l]; };
    return each(to, mask, choose), true;
  }
  if (i.op == SETP && i.boolean == 0) {
    if (t == F32) return compare32<float>(to, mask, i.compare, a, b);
    if (t == S32) return compare32<int32_t>(to, mask, i.compare, a, b);
    return integer && compare32<uint32_t>(to, mask, i.compare, a, b);
  }
  if (t == F32) return quick_float(to, mask, i.op, a, b, c);
  return integer && quick_integer(to, mask, i, a, b, c);
}

void Block::pack(Warp& w, const Instruction& i, uint32_t mask) {
  const size_t parts = i.op == PACK ? i.in.size() : i.to.size();
  const size_t width = static_cast<size_t>(size_of(i.type)) * 8 / parts;
  const uint64_t ones = (1ull << width) - 1;
  Lanes a, r{};
  if (i.op == UNPACK) fetch(w, i.in[0], a);
  for (size_t n = 0; n < parts; ++n) {
    if (i.op == UNPACK) {
      for (size_t l = 0; l < kWarp; ++l) r[l] = a[l] >> (width * n) & ones;
      store(w, i.to[n], r, mask);
    } else {
      fetch(w, i.in[n], a);
      for (size_t l = 0; l < kWarp; ++l) r[l] |= (a[l] & ones) << (width * n);
    }
  }
  if (i.op == PACK) store(w, i.to[0], r, mask);
}

template <typename T>
static bool compared(Compare c, T a, T b, bool nan) {
  switch (c) {
    case EQ: return !nan && a == b;
    case NE: return !nan && a != b;
    case LT: return !nan && a < b;
    case LE: return !nan && a <= b;
    case GT: return !nan && a > b;
    case GE: return !nan && a >= b;
    case EQU: return nan || a == b;
    case NEU: return nan || a != b;
    case LTU: return nan || a < b;
    case LEU: return nan || a <= b;
    case GTU: return nan || a > b;
    case GEU: return nan || a >= b;
    case NUM: return !nan;
    default: return nan;
  }
}

static bool setp(Compare c, Type t, uint64_t a, uint64_t b) {
  double x = 0, y = 0;
  switch (t) {
    case F32: x = f32(a), y = f32(b); break;
    case F64: x = f64(a), y = f64(b); break;
    case F16: x = from_f16(static_cast<uint16_t>(a)), y = from_f16(static_cast<uint16_t>(b)); break;
    case BF16:
      x = from_bf16(static_cast<uint16_t>(a)), y = from_bf16(static_cast<uint16_t>(b));
      break;
    default:
      a = widen(a, t), b = widen(b, t);
      if (!is_signed(t)) return compared(c, a, b, false);
      return compared(c, static_cast<int64_t>(a), static_cast<int64_t>(b), false);
  }
  return compared(c, x, y, std::isnan(x) || std::isnan(y));
}

void Block::compute(Warp& w, const Instruction& i, uint32_t mask) {
  if (i.op == PACK || i.op == UNPACK) pack(w, i, mask);
  else if (!quick32(w, i, mask)) compute_lanes(w, i, mask);
}

void Block::compute_lanes(Warp& w, const Instruction& i, uint32_t mask) {
  Lanes in[4], r;
  for (size_t n = 0; n < 4 && n < i.in.size(); ++n) fetch(w, i.in[n], in[n]);
  for (size_t n = i.in.size(); n < 4; ++n) in[n].fill(0);
  const Lanes &a = in[0], &b = in[1], &c = in[2], &d = in[3];
  const auto each_lane = [&](auto f) {
    for (size_t l = 0; l < kWarp; ++l) r[l] = f(l);
  };
  const bool negated = i.in.size() > 2 && i.in[2].negated;
  const bool wide = i.type == U64 || i.type == S64 || i.type == B64;
  if (i.op == MOV) {
    r = a;
  } else if (i.op == CVTA_TO_SHARED) {
    each_lane([&](size_t l) { return a[l] & (kSharedWindow - 1); });
  } else if (i.op == CVTA_SHARED) {
    each_lane([&](size_t l) { return a[l] | kSharedWindow; });
  } else if (i.op == SELP) {
    each_lane([&](size_t l) { return (c[l] & 1) != negated ? a[l] : b[l]; });
  } else if (i.op == SETP) {
    each_lane([&](size_t l) -> uint64_t {
      const bool x = setp(i.compare, i.type, a[l], b[l]), other = (c[l] & 1) != negated;
      return i.boolean == 0 ? x : i.boolean == 1 ? x && other : i.boolean == 2 ? x || other
                                                                               : x != other;
    });
  } else if (i.op == CVT && (i.type == F16X2 || i.type == BF16X2) && i.in.size() == 2) {
    const bool half = i.type == F16X2;  // the first operand goes to the upper half
    each_lane([&](size_t l) -> uint64_t {
      const float x = f32(a[l]), y = f32(b[l]);
      return uint32_t{half ? to_f16(x) : to_bf16(x)} << 16 | (half ? to_f16(y) : to_bf16(y));
    });
  } else if (i.op == CVT) {
    each_lane([&](size_t l) { return convert(i, a[l]); });
  } else if (wide && i.op == ADD) {
    each_lane([&](size_t l) { return a[l] + b[l]; });
  } else if (i.op == MUL_WIDE && i.type == U32) {
    each_lane([&](size_t l) { return (a[l] & 0xFFFFFFFF) * (b[l] & 0xFFFFFFFF); });
  } else if (i.op == MUL_WIDE && i.type == S32) {
    each_lane([&](size_t l) { return widen(a[l], S32) * widen(b[l], S32); });
  } else {
    for (size_t l = 0; l < kWarp; ++l) {
      if (mask >> l & 1) r[l] = arithmetic(i, a[l], b[l], c[l], d[l]);
    }
  }
  store(w, i.to[0], r, mask);
}

}  // namespace ptxsim
