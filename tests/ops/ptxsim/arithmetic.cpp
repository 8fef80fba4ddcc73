// Operations on the values of one thread.
#include <algorithm>

#include "block.h"
#include "values.h"

namespace ptxsim {

static PtxError unknown() { return PtxError("not implemented"); }

static float rounded(uint8_t mode, float x) {
  switch (mode) {
    case ROUND_ZERO: return std::trunc(x);
    case ROUND_NEAREST: return std::nearbyint(x);
    case ROUND_DOWN: return std::floor(x);
    case ROUND_UP: return std::ceil(x);
    default: return x;
  }
}

static bool is_number(Type t) { return t >= F16; }

static double number(Type t, uint64_t x) {
  switch (t) {
    case F32: return f32(x);
    case F64: return f64(x);
    case F16: return from_f16(static_cast<uint16_t>(x));
    case BF16: return from_bf16(static_cast<uint16_t>(x));
    default:
      return is_signed(t) ? static_cast<double>(static_cast<int64_t>(widen(x, t)))
                          : static_cast<double>(widen(x, t));
  }
}

static uint64_t to_integer(Type t, double x) {  // saturates
  if (std::isnan(x)) return 0;
  const auto clamp = [&](double low, double high) { return std::min(std::max(x, low), high); };
  switch (t) {
    case U8: return static_cast<uint8_t>(clamp(0, 255));
    case U16: return static_cast<uint16_t>(clamp(0, 65535));
    case S16: return static_cast<uint16_t>(static_cast<int16_t>(clamp(-32768, 32767)));
    case U32: return static_cast<uint32_t>(clamp(0, 4294967295.0));
    case S32:
      return static_cast<uint32_t>(static_cast<int32_t>(clamp(-2147483648.0, 2147483647.0)));
    case U64:
      return x <= 0 ? 0 : x >= 18446744073709551615.0 ? ~0ull : static_cast<uint64_t>(x);
    case S64:
      if (x >= 9223372036854775807.0) return 0x7FFFFFFFFFFFFFFF;
      return x <= -9223372036854775808.0 ? 1ull << 63
                                         : static_cast<uint64_t>(static_cast<int64_t>(x));
    default: throw unknown();
  }
}

uint64_t convert(const Instruction& i, uint64_t x) {
  const Type to = i.type, from = i.from;
  if (!is_number(from) && !is_number(to)) {
    if (i.saturate) throw unknown();
    return widen(widen(x, from), to);
  }
  double value = number(from, x);
  if (!is_number(to)) {
    if (i.mode == ROUND_NONE) throw unknown();
    return to_integer(to, from == F64 ? std::trunc(value)
                                      : rounded(i.mode, static_cast<float>(value)));
  }
  if (i.mode != ROUND_NONE) value = rounded(i.mode, static_cast<float>(value));
  if (i.saturate) value = std::isnan(value) ? 0 : std::min(std::max(value, 0.0), 1.0);
  if (to == F64) return f64(value);
  float single = static_cast<float>(value);
  if (!is_number(from)) {  // directly, not by way of double
    single = is_signed(from) ? static_cast<float>(static_cast<int64_t>(widen(x, from)))
                             : static_cast<float>(widen(x, from));
  }
  if (i.ftz) single = flush(single);
  if (to == F32) return f32(single);
  if (to != F16 && to != BF16) throw unknown();
  return to == F16 ? to_f16(single) : to_bf16(single);
}

template <typename T>  // float, or double
static T operate(Op op, T x, T y, T z) {
  switch (op) {
    case ADD: return x + y;
    case SUB: return x - y;
    case MUL_LO: return x * y;
    case FMA: return std::fma(x, y, z);
    case DIV: return x / y;
    case NEG: return -x;
    case ABS: return std::abs(x);
    case MIN: return std::fmin(x, y);
    case MAX: return std::fmax(x, y);
    case RCP: return 1 / x;
    case SQRT: return std::sqrt(x);
    case RSQRT: return static_cast<T>(1 / std::sqrt(static_cast<double>(x)));
    case EX2: return static_cast<T>(std::exp2(static_cast<double>(x)));
    case LG2: return static_cast<T>(std::log2(static_cast<double>(x)));
    case TANH: return std::tanh(x);
    case COPYSIGN: return std::copysign(y, x);
    default: throw unknown();
  }
}

static uint64_t on_floats(const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
  float x = f32(a), y = f32(b), z = f32(c);
  if (i.ftz) x = flush(x), y = flush(y), z = flush(z);
  float r = operate(i.op, x, y, z);
  if (i.saturate) r = std::isnan(r) ? 0 : std::min(std::max(r, 0.0f), 1.0f);
  return f32(i.ftz ? flush(r) : r);
}

// f16 and bf16, one or a pair: in double, where sums and products of two are exact.
static uint64_t on_halves(const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
  const bool pair = i.type == F16X2 || i.type == BF16X2;
  const Type one = i.type == F16X2 ? F16 : i.type == BF16X2 ? BF16 : i.type;
  uint64_t r = 0;
  for (int n = 0; n < (pair ? 2 : 1); ++n) {
    const int by = n * 16;
    const double x = number(one, a >> by), y = number(one, b >> by), z = number(one, c >> by);
    const auto single = static_cast<float>(operate(i.op, x, y, z));
    r |= uint64_t{one == F16 ? to_f16(single) : to_bf16(single)} << by;
  }
  return r;
}

static uint64_t bit_field(const Instruction& i, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  const uint32_t width = static_cast<uint32_t>(size_of(i.type)) * 8;
  const uint64_t ua = widen(a, i.type), ub = widen(b, i.type);
  if (i.op == BFI) {
    const uint32_t at = c & 255, len = d & 255;
    if (at >= width || len == 0) return ub;
    const uint64_t ones = len >= 64 ? ~0ull : (1ull << len) - 1;
    return widen((ub & ~(ones << at)) | (ua & ones) << at, i.type);
  }
  const uint32_t at = b & 255, len = c & 255;
  if (len == 0) return 0;
  if (is_signed(i.type)) {
    const auto value = static_cast<int64_t>(ua);
    const int64_t moved = value >> std::min(at, 63u);
    if (len >= width) return widen(static_cast<uint64_t>(moved), i.type);
    const uint32_t left = 64 - std::min(len, width - std::min(at, width - 1));
    return widen(static_cast<uint64_t>(static_cast<int64_t>(static_cast<uint64_t>(moved) << left)
                                       >> left), i.type);
  }
  const uint64_t ones = len >= 64 ? ~0ull : (1ull << len) - 1;
  return at >= width ? 0 : widen(ua >> at & ones, i.type);
}

static uint64_t permute(uint64_t a, uint64_t b, uint64_t c) {  // prmt
  const uint64_t both = (a & 0xFFFFFFFF) | b << 32;
  uint32_t r = 0;
  for (int n = 0; n < 4; ++n) {
    const uint32_t select = c >> (n * 4) & 15;
    uint32_t byte = static_cast<uint32_t>(both >> ((select & 7) * 8) & 255);
    if (select & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (n * 8);
  }
  return r;
}

static uint64_t lookup(uint64_t a, uint64_t b, uint64_t c, uint64_t table) {  // lop3
  uint32_t r = 0;
  for (uint32_t row = 0; row < 8; ++row) {
    if (!(table >> row & 1)) continue;
    r |= static_cast<uint32_t>((row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c));
  }
  return r;
}

static uint64_t divide(const Instruction& i, uint64_t a, uint64_t b) {
  const auto sa = static_cast<int64_t>(a), sb = static_cast<int64_t>(b);
  const bool sign = is_signed(i.type);
  if (i.op == DIV) {
    if (b == 0) return widen(~0ull, i.type);
    return widen(!sign ? a / b : static_cast<uint64_t>(sb == -1 ? -sa : sa / sb), i.type);
  }
  if (b == 0) return a;
  return widen(!sign ? a % b : static_cast<uint64_t>(sb == -1 ? 0 : sa % sb), i.type);
}

static uint64_t high_product(const Instruction& i, uint64_t a, uint64_t b) {
  const auto sa = static_cast<int64_t>(a), sb = static_cast<int64_t>(b);
  const int width = size_of(i.type) * 8;
  if (width == 64) {
    return is_signed(i.type) ? static_cast<uint64_t>(static_cast<__int128>(sa) * sb >> 64)
                             : static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
  }
  return widen(is_signed(i.type) ? static_cast<uint64_t>(sa * sb >> width) : a * b >> width,
               i.type);
}

static uint64_t on_integers(const Instruction& i, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  const Type t = i.type;
  const auto width = static_cast<uint32_t>(size_of(t) * 8), by = static_cast<uint32_t>(b);
  const uint64_t ua = widen(a, t), ub = widen(b, t);
  const auto sa = static_cast<int64_t>(ua), sb = static_cast<int64_t>(ub);
  const bool sign = is_signed(t);
  switch (i.op) {
    case ADD: return widen(a + b, t);
    case SUB: return widen(a - b, t);
    case MUL_LO: return widen(ua * ub, t);
    case MUL_WIDE: return ua * ub;
    case MUL_HI: return high_product(i, ua, ub);
    case MAD_LO: return widen(ua * ub + widen(c, t), t);
    case MAD_WIDE: return ua * ub + c;
    case DIV: case REM: return divide(i, ua, ub);
    case AND: return a & b;
    case OR: return a | b;
    case XOR: return a ^ b;
    case NOT: return t == PRED ? !(a & 1) : widen(~a, t);
    case NEG: return widen(0 - a, t);
    case ABS: return widen(static_cast<uint64_t>(sa < 0 ? -sa : sa), t);
    case SHL: return by >= width ? 0 : widen(a << by, t);
    case SHR:
      if (sign) return widen(static_cast<uint64_t>(sa >> std::min(by, 63u)), t);
      return by >= width ? 0 : widen(ua >> by, t);
    case MIN: return sign ? static_cast<uint64_t>(std::min(sa, sb)) : std::min(ua, ub);
    case MAX: return sign ? static_cast<uint64_t>(std::max(sa, sb)) : std::max(ua, ub);
    case BFI: case BFE: return bit_field(i, a, b, c, d);
    case PRMT: return permute(a, b, c);
    case POPC: return static_cast<uint64_t>(__builtin_popcountll(ua));
    case CLZ:
      return ua == 0 ? width : static_cast<uint64_t>(__builtin_clzll(ua)) - (64 - width);
    case LOP3: return lookup(a, b, c, d);
    case SHF: {
      const uint64_t both = (a & 0xFFFFFFFF) | b << 32;
      const uint32_t shift = c & 31;
      return static_cast<uint32_t>(i.mode ? both >> shift : both << shift >> 32);
    }
    default: throw unknown();
  }
}

uint64_t arithmetic(const Instruction& i, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  switch (i.type) {
    case F32: return on_floats(i, a, b, c);
    case F64: return f64(operate(i.op, f64(a), f64(b), f64(c)));
    case F16: case BF16: case F16X2: case BF16X2: return on_halves(i, a, b, c);
    default: return on_integers(i, a, b, c, d);
  }
}

// One step of a reduction: redux.sync, atom, red.
uint64_t reduce_two(const Instruction& i, uint64_t a, uint64_t b) {
  static const std::map<uint8_t, Op> kOps = {{RED_ADD, ADD}, {RED_MIN, MIN}, {RED_MAX, MAX},
                                             {RED_AND, AND}, {RED_OR, OR}, {RED_XOR, XOR}};
  Instruction step;
  step.op = kOps.at(i.mode), step.type = i.type;
  return arithmetic(step, a, b, 0, 0);
}

}  // namespace ptxsim
