// What softmax attention is made of: scores and mixtures by blocks of 64 tokens. Compiled for each instruction set.
#pragma once

#include <cstdint>

#include "activation.h"

namespace pliant {

constexpr int64_t kBlock = 64;  // tokens

namespace {

// scores[64] = q K, K transposed: [width][64]
inline void block_scores(const float* q, const float* keys, int64_t width, float* scores) {
  float sum[kBlock] = {};
  for (int64_t d = 0; d < width; ++d) {
    const float factor = q[d];
    const float* row = keys + d * kBlock;
    for (int64_t t = 0; t < kBlock; ++t) sum[t] += factor * row[t];
  }
  for (int64_t t = 0; t < kBlock; ++t) scores[t] = sum[t];
}

// out[width] += p V, V as [tokens][width]
inline void block_mix(const float* p, const float* values, int64_t tokens, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + kBlock <= width; d += kBlock) {
    float sum[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) sum[i] = out[d + i];
    for (int64_t t = 0; t < tokens; ++t) {
      const float factor = p[t];
      const float* row = values + t * width + d;
      for (int64_t i = 0; i < kBlock; ++i) sum[i] += factor * row[i];
    }
    for (int64_t i = 0; i < kBlock; ++i) out[d + i] = sum[i];
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = d; i < width; ++i) out[i] += p[t] * values[t * width + i];
  }
}

// Compared as whole numbers that are ordered as the floats are: of these, a compiler may take the largest in any order.
inline float largest_score(const float* scores, int64_t n) {
  const auto ordered = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  int32_t most = ordered(static_cast<int32_t>(0xff800000));  // -infinity
  for (int64_t t = 0; t < n; ++t) {
    int32_t bits;
    std::memcpy(&bits, scores + t, 4);
    most = ordered(bits) > most ? ordered(bits) : most;
  }
  const int32_t bits = ordered(most);
  float largest;
  std::memcpy(&largest, &bits, 4);
  return largest;
}

// p = e^(scores - most); returns their sum. Eight sums side by side, in the same order everywhere.
inline float exponentials(float* scores, int64_t n, float most) {
  float lanes[8] = {};
  int64_t t = 0;
  for (; t + 8 <= n; t += 8) {
    for (int64_t l = 0; l < 8; ++l) lanes[l] += scores[t + l] = exponential(scores[t + l] - most);
  }
  float sum = 0;
  for (; t < n; ++t) sum += scores[t] = exponential(scores[t] - most);
  for (const float lane : lanes) sum += lane;
  return sum;
}

}  // namespace
}  // namespace pliant
