// Rows of x times panels of W, the loop that every instruction set shares. A set `I` has these static members:
//
//   The most rows (1 or 2) for which two panels are multiplied at once:
//     template <Format F> constexpr int paired
//   Whether a sparse stream is multiplied as it is, without making it dense first:
//     template <Format F, int R> constexpr bool fused
//   The sums of R rows and P panels so far; `add` takes the next steps of dense streams, or of sparse ones if fused:
//     template <Format F, bool fused, int R, int P> struct Sum
//       Sum(const Matrix&, int64_t panel, const Input&, int64_t row)
//       void add(const uint8_t* const (&w)[P], int64_t chunk, int64_t steps)
//       void add(const uint8_t* (&masks)[P], const uint8_t* (&values)[P], int64_t chunk, int64_t steps)
//       void store(float* out, int64_t stride)
//   A function that makes a sparse stream dense and returns the end of its values:
//     template <Format F> const uint8_t* expand(masks, values, steps, out)
//
// Every output is summed in an order that depends only on its own row and column. The result of a token is the same, to
// the bit, alone or next to other tokens, and with any number of threads.
//
// Loops over rows, panels and halves of a register are unrolled by pragma. GCC unrolls such loops too late by itself:
// it then keeps the sums in memory and stores each at every step.
#pragma once

#include <cstring>

#include "kernels.h"

namespace pliant {
namespace {

template <class T>
T read(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

constexpr int kRows = 4;  // at once, at most

template <int R>
struct Rows {  // of x, those that a kernel works on
  const float* values[R];
  const int8_t* codes[R];
  const float* scales[R];
  const int32_t* sums[R];
  Rows(const Input& x, int64_t row) {
    for (int r = 0; r < R; ++r) {
      values[r] = x.values + (row + r) * x.stride;
      codes[r] = x.codes + (row + r) * x.stride;
      scales[r] = x.scales + (row + r) * x.slices;
      sums[r] = x.sums + (row + r) * x.slices;
    }
  }
};

template <class I, Format F, bool S, int R, int P>
void block(const Matrix& w, int64_t panel, const Input& x, int64_t row, float* out, int64_t stride,
           const uint8_t* expanded) {
  constexpr int64_t chunk_steps = kChunk / step_inputs(F);
  constexpr bool fused = S && I::template fused<F, R>;
  typename I::template Sum<F, fused, R, P> sum(w, panel, x, row);
  const uint8_t* values[P];
  const uint8_t* masks[P];
  for (int p = 0; p < P; ++p) {
    values[p] = expanded ? expanded + p * w.steps * kStepBytes : w.panel_values(panel + p);
    masks[p] = S ? w.panel_masks(panel + p) : nullptr;
  }
  alignas(64) uint8_t buffer[S && !fused ? P : 1][S && !fused ? chunk_steps * kStepBytes : 1];
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    const int64_t steps = chunk + 1 < w.chunks ? chunk_steps : w.steps - chunk * chunk_steps;
    if constexpr (fused) {
      sum.add(masks, values, chunk, steps);
    } else if constexpr (S) {
      const uint8_t* dense[P];
      for (int p = 0; p < P; ++p) {
        values[p] = I::template expand<F>(masks[p], values[p], steps, buffer[p]);
        masks[p] += steps * mask_bytes(F);
        dense[p] = buffer[p];
      }
      sum.add(dense, chunk, steps);
    } else {
      sum.add(values, chunk, steps);
      for (int p = 0; p < P; ++p) values[p] += steps * kStepBytes;
    }
  }
  sum.store(out, stride);
}

// R rows at once, and the remaining ones at once, too.
template <class I, Format F, bool S, int P, int R>
void rows_of(const Matrix& w, int64_t panel, const Input& x, int64_t row, float* out, int64_t stride,
             const uint8_t* expanded) {
  for (; row + R <= x.rows; row += R) block<I, F, S, R, P>(w, panel, x, row, out + row * stride, stride, expanded);
  if constexpr (R > 1) rows_of<I, F, S, P, R - 1>(w, panel, x, row, out, stride, expanded);
}

template <class I, Format F>
void panels_of(const Matrix& w, int64_t panel, int64_t count, const Input& x, float* out, int64_t stride,
               uint8_t* scratch) {
  constexpr int paired = I::template paired<F>;
  if (w.sparse && x.rows > kRows) {  // expand once for all rows
    for (int64_t p = 0; p < count; ++p) {
      uint8_t* dense = scratch;
      I::template expand<F>(w.panel_masks(panel + p), w.panel_values(panel + p), w.steps, dense);
      rows_of<I, F, false, 1, kRows>(w, panel + p, x, 0, out + p * kPanel, stride, dense);
    }
    return;
  }
  const auto one = w.sparse ? rows_of<I, F, true, 1, kRows> : rows_of<I, F, false, 1, kRows>;
  const auto two = w.sparse ? rows_of<I, F, true, 2, paired> : rows_of<I, F, false, 2, paired>;
  int64_t p = 0;
  if (x.rows <= paired) {
    for (; p + 2 <= count; p += 2) two(w, panel + p, x, 0, out + p * kPanel, stride, nullptr);
  }
  for (; p < count; ++p) one(w, panel + p, x, 0, out + p * kPanel, stride, nullptr);
}

template <class I>
void multiply(const Matrix& w, int64_t panel, int64_t count, const Input& x, float* out, int64_t stride,
              uint8_t* scratch) {
  switch (w.format) {
    case Format::bf16:
      return panels_of<I, Format::bf16>(w, panel, count, x, out, stride, scratch);
    case Format::int8:
      return panels_of<I, Format::int8>(w, panel, count, x, out, stride, scratch);
    case Format::int4:
      return panels_of<I, Format::int4>(w, panel, count, x, out, stride, scratch);
  }
}

template <class I>
void expand(const Matrix& w, int64_t panel, uint8_t* out) {
  switch (w.format) {
    case Format::bf16:
      I::template expand<Format::bf16>(w.panel_masks(panel), w.panel_values(panel), w.steps, out);
      break;
    case Format::int8:
      I::template expand<Format::int8>(w.panel_masks(panel), w.panel_values(panel), w.steps, out);
      break;
    case Format::int4:
      I::template expand<Format::int4>(w.panel_masks(panel), w.panel_values(panel), w.steps, out);
      break;
  }
}

}  // namespace
}  // namespace pliant
