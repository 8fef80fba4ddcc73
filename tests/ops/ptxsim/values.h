// Numbers as registers hold them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ptx.h"

namespace ptxsim {

template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a change of type alone");
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}
inline float f32(uint64_t x) { return bits<float>(static_cast<uint32_t>(x)); }
inline uint32_t f32(float x) { return bits<uint32_t>(x); }
inline double f64(uint64_t x) { return bits<double>(x); }
inline uint64_t f64(double x) { return bits<uint64_t>(x); }
inline float from_f16(uint16_t x) { return static_cast<float>(bits<_Float16>(x)); }
inline float from_bf16(uint16_t x) { return bits<float>(uint32_t{x} << 16); }
inline uint16_t to_f16(float x) {
  return std::isnan(x) ? 0x7FFF : bits<uint16_t>(static_cast<_Float16>(x));
}
inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t word = bits<uint32_t>(x);
  const uint32_t kept = word >> 16, rest = word & 0xFFFF;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (kept & 1));
  return static_cast<uint16_t>(kept + up);
}
inline float flush(float x) {  // subnormal numbers to zero
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline int size_of(Type t) {
  switch (t) {
    case U8: case S8: case B8: return 1;
    case U16: case S16: case B16: case F16: case BF16: return 2;
    case U64: case S64: case B64: case F64: return 8;
    default: return 4;
  }
}
inline bool is_signed(Type t) { return t == S8 || t == S16 || t == S32 || t == S64; }

// The value as its type has it: sign or zero extended to 64 bits.
inline uint64_t widen(uint64_t x, Type t) {
  switch (t) {
    case U8: case B8: return static_cast<uint8_t>(x);
    case S8: return static_cast<uint64_t>(int64_t{static_cast<int8_t>(x)});
    case U16: case B16: case F16: case BF16: return static_cast<uint16_t>(x);
    case S16: return static_cast<uint64_t>(int64_t{static_cast<int16_t>(x)});
    case U64: case S64: case B64: case F64: return x;
    case S32: return static_cast<uint64_t>(int64_t{static_cast<int32_t>(x)});
    default: return static_cast<uint32_t>(x);
  }
}

}  // namespace ptxsim
