// The parts of softmax attention: scores and mixtures by blocks of 64 tokens. Compiled for each instruction set.
#pragma once

#include <cstdint>

#include "activation.h"

namespace pliant {

constexpr int64_t kBlock = 64;  // tokens

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLaneBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kLaneBytes = 32;
#else
constexpr int64_t kLaneBytes = 16;
#endif
using Lanes = float __attribute__((vector_size(kLaneBytes)));

// a * b + c, rounded once like the vector lanes; otherwise a compiler may split a loop of these into products and sums.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// R rows times columns that fill C registers of each.
template <int R, int C>
void products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, float* out,
              int64_t out_stride, bool add) {
  constexpr int64_t lanes = kLaneBytes / 4;
  Lanes sums[R][C] = {};
  if (add) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) std::memcpy(&sums[r][c], out + r * out_stride + c * lanes, kLaneBytes);
  }
  for (int64_t i = 0; i < n; ++i) {
    Lanes row[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) std::memcpy(&row[c], b + i * b_stride + c * lanes, kLaneBytes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] += a[r * a_stride + i] * row[c];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) std::memcpy(out + r * out_stride + c * lanes, &sums[r][c], kLaneBytes);
}

template <int R, int C>
void columns_of(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, int64_t columns,
                float* out, int64_t out_stride, bool add) {
  constexpr int64_t wide = C * kLaneBytes / 4;
  int64_t c = 0;
  for (; c + wide <= columns; c += wide) products<R, C>(a, a_stride, b + c, b_stride, n, out + c, out_stride, add);
  if constexpr (C > 1) {
    columns_of<R, C / 2>(a, a_stride, b + c, b_stride, n, columns - c, out + c, out_stride, add);
  } else {
    for (; c < columns; ++c) {
      for (int r = 0; r < R; ++r) {
        float sum = add ? out[r * out_stride + c] : 0;
        for (int64_t i = 0; i < n; ++i) sum = fused(a[r * a_stride + i], b[i * b_stride + c], sum);
        out[r * out_stride + c] = sum;
      }
    }
  }
}

template <int R>
void rows_of_product(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t n,
                     int64_t columns, float* out, int64_t out_stride, bool add) {
  constexpr int C = R == 1 ? 8 : R == 4 ? 2 : 4;  // 8 or 12 registers of sums
  for (; rows >= R; rows -= R) {
    columns_of<R, C>(a, a_stride, b, b_stride, n, columns, out, out_stride, add);
    a += R * a_stride;
    out += R * out_stride;
  }
  if constexpr (R > 1) rows_of_product<R - 1>(a, a_stride, rows, b, b_stride, n, columns, out, out_stride, add);
}

// out[rows][columns] (+)= a[rows][n] b[n][columns]
inline void product(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t n,
                    int64_t columns, float* out, int64_t out_stride, bool add) {
  rows_of_product<4>(a, a_stride, rows, b, b_stride, n, columns, out, out_stride, add);
}

// Compared as integers in the order of the floats: a compiler may take the largest integer in any order.
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
