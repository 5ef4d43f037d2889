// The activation between the halves of a gated MLP. Compiled for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pliant {

enum class Activation : int32_t { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, relu = 4 };

namespace {

// e^x within one unit in the last place for x from -87 to 88; x outside of this range, NaN too, counts as its end.
// Without a branch, so that it is vectorised. The ends are compared as integers, which are ordered like floats of one
// sign, because compilers turn comparisons of floats into branches.
inline float exponential(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = bits < 0x42b00000 ? bits : 0x42b00000;
  auto pattern = static_cast<uint32_t>(bits);
  pattern = pattern < 0xc2ae0000 ? pattern : 0xc2ae0000;
  std::memcpy(&x, &pattern, 4);
  constexpr float whole = 12582912;  // 1.5 * 2^23: a number added to it is rounded into its last bits
  const float moved = x * 1.44269504f + whole;
  const float n = moved - whole;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  std::memcpy(&pattern, &moved, 4);
  pattern = (pattern + 127) << 23;
  float scale;
  std::memcpy(&scale, &pattern, 4);
  return p * scale;
}

// y = activation(gate) * up, n of each
inline void gate(const float* gate, const float* up, int64_t n, Activation kind, float* out) {
  switch (kind) {
    case Activation::none:
      for (int64_t i = 0; i < n; ++i) out[i] = gate[i] * up[i];
      break;
    case Activation::silu:
      for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
      break;
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) out[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
      break;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; ++i) {  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
        const float u = 0.79788456f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]);
        out[i] = gate[i] / (1.0f + exponential(-2.0f * u)) * up[i];
      }
      break;
    case Activation::relu:
      for (int64_t i = 0; i < n; ++i) out[i] = (gate[i] > 0 ? gate[i] : 0) * up[i];
      break;
  }
}

}  // namespace
}  // namespace pliant
