// bfloat16 and back, for instruction sets without an instruction for it and for the rest of a vector.
#pragma once

#include <cstdint>
#include <cstring>

namespace pliant {
namespace {

// To the nearest, in a tie to the even one; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

}  // namespace
}  // namespace pliant
