// Kernels for AMX, over the operations `L` of lanes512.h and the tiles `T` of tiles.h.
//
// A step of the stream is one row of a tile of weights, in int4 two rows. Dense weights are loaded in place; weights
// that are sparse, packed two in a byte or fewer than a whole tile are expanded first, chunk by chunk.
//
// int8 and int4: tiles multiply slices to integers, which are then added in the order of the other sets, with the same
// results. Few rows are left to AVX-512, which needs no tiles.
//
// bf16: always tiles, even for one row. They round x to bf16 and sum in an order of their own, so that a row's result
// would otherwise depend on the number of rows. It differs from that of the other sets by the rounding of x.
#pragma once

#include "avx512.h"
#include "tiles.h"

namespace pliant {
namespace {

constexpr int64_t kFewRows = 4;
constexpr int64_t kManyRows = 2 * kTileRows;  // rows multiplied with a chunk together

// The weights of a panel, chunk by chunk, as rows of tiles: 64 bytes for every 4 bytes of x.
template <class L, Format F>
struct Weights {
  static constexpr int64_t room = F == Format::bf16 ? 4096 : 2048;  // bytes for one chunk
  const uint8_t* masks;
  const uint8_t* values;

  Weights(const Matrix& w, int64_t panel)
      : masks(w.sparse ? w.panel_masks(panel) : nullptr), values(w.panel_values(panel)) {}

  // Everything after the last step is zero.
  const uint8_t* next(int64_t steps, uint8_t* out) {
    const uint8_t* at = out;
    int64_t bytes = steps * kStepBytes * registers(F);
    if constexpr (F == Format::int4) {
      masks ? unpack(Sparse<L, F, 1>{{masks}, {values}}, steps, out) : unpack(Dense<L, F, 1>{{values}}, steps, out);
    } else if (masks) {
      values = Avx512<L>::template expand<F>(masks, values, steps, out);
    } else {
      if (bytes == room) {
        at = values;
      } else {
        std::memcpy(out, values, static_cast<size_t>(bytes));
      }
      values += bytes;
    }
    if (masks) masks += steps * mask_bytes(F);
    if (bytes < room) std::memset(out + bytes, 0, static_cast<size_t>(room - bytes));
    return at;
  }

 private:
  template <class From>
  void unpack(From from, int64_t steps, uint8_t* out) {
    for (int64_t i = 0; i < steps; ++i, out += 2 * kStepBytes) {
      typename L::Ints w[2];
      from.template take<1>(w);
      const auto zero = Code<L, F>::zero();
      const auto first = From::sparse ? L::even_bytes(w[0], w[1]) : w[0];
      const auto second = From::sparse ? L::odd_bytes(w[0], w[1]) : w[1];
      L::store(out, L::subtract_bytes(first, zero));
      L::store(out + kStepBytes, L::subtract_bytes(second, zero));
    }
    values = from.values[0];
  }
};

template <class L, class T>
struct Amx {
  // Rows of x, N tiles of them, times P panels.
  template <int N, int P>
  static void bf16(const Matrix& w, int64_t panel, const Input& x, int64_t row, int64_t rows, float* out,
                   int64_t stride) {
    constexpr int64_t tile_steps = 16, tile_bytes = tile_steps * kStepBytes, line = 2 * kChunk;
    alignas(64) uint8_t rounded[N * kTileRows][line];
    alignas(64) uint8_t buffer[P][Weights<L, Format::bf16>::room];
    T tiles(Shape(rows, tile_steps));
    tiles.template zero<0>();
    if constexpr (P == 2) tiles.template zero<1>();
    if constexpr (N == 2) tiles.template zero<2>();
    if constexpr (N == 2 && P == 2) tiles.template zero<3>();
    Weights<L, Format::bf16> weights[2] = {{w, panel}, {w, panel + P - 1}};
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      const int64_t steps = chunk + 1 < w.chunks ? kChunk / 2 : w.steps - chunk * (kChunk / 2);
      const int64_t tile_loads = ceil_div(steps, tile_steps);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = x.values + (row + r) * x.stride + chunk * kChunk;
        for (int64_t k = 0; k < 32 * tile_loads; k += 16)
          L::store_flushed_bf16(rounded[r] + 2 * k, L::load_floats(from + k));
      }
      const uint8_t* at[P];
      for (int p = 0; p < P; ++p) at[p] = weights[p].next(steps, buffer[p]);
      for (int64_t i = 0; i < tile_loads; ++i) {
        tiles.template load<4>(rounded[0] + 64 * i, line);
        tiles.template load<6>(at[0] + tile_bytes * i, kStepBytes);
        tiles.template dot_bf16<0, 4, 6>();
        if constexpr (P == 2) {
          tiles.template load<7>(at[1] + tile_bytes * i, kStepBytes);
          tiles.template dot_bf16<1, 4, 7>();
        }
        if constexpr (N == 2) {
          tiles.template load<5>(rounded[kTileRows] + 64 * i, line);
          tiles.template dot_bf16<2, 5, 6>();
          if constexpr (P == 2) tiles.template dot_bf16<3, 5, 7>();
        }
      }
    }
    const int64_t bytes = stride * 4;
    tiles.template store<0>(out, bytes);
    if constexpr (P == 2) tiles.template store<1>(out + kPanel, bytes);
    if constexpr (N == 2) tiles.template store<2>(out + kTileRows * stride, bytes);
    if constexpr (N == 2 && P == 2) tiles.template store<3>(out + kTileRows * stride + kPanel, bytes);
  }

  template <int N>
  struct Slices {  // of a chunk: [slice][row][output]
    int32_t dots[kChunk / kSlice][N * kTileRows][kPanel];
  };

  // One slice. Odd and even ones use different tiles, so that they do not wait for each other.
  template <int odd, int N>
  static void slice(T& tiles, const int8_t* x, int64_t stride, const uint8_t* w, int32_t (*dots)[kPanel]) {
    tiles.template load<6 + odd>(w, kStepBytes);
    tiles.template load<4>(x, stride);
    tiles.template zero<odd>();
    tiles.template dot_int8<odd, 4, 6 + odd>();
    tiles.template store<odd>(dots[0], kStepBytes);
    if constexpr (N == 2) {
      tiles.template load<5>(x + kTileRows * stride, stride);
      tiles.template zero<2 + odd>();
      tiles.template dot_int8<2 + odd, 5, 6 + odd>();
      tiles.template store<2 + odd>(dots[kTileRows], kStepBytes);
    }
  }

  template <Format F, int N, int P>
  static void codes(const Matrix& w, int64_t panel, const Input& x, int64_t row, int64_t rows, float* out,
                    int64_t stride) {
    using Floats = typename L::Floats;
    constexpr int64_t slice_rows = kSlice / 4, slice_steps = kSlice / step_inputs(F);
    const int slices = F == Format::int4 ? __builtin_ctzll(static_cast<uint64_t>(w.group / kSlice)) : 0;  // as in SumOf
    alignas(64) uint8_t buffer[Weights<L, F>::room];
    alignas(64) Slices<N> of_chunk;
    alignas(64) Floats sums[P][N * kTileRows];
    for (auto& panel_sums : sums)
      for (auto& sum : panel_sums) sum = L::floats(0);
    Weights<L, F> weights[2] = {{w, panel}, {w, panel + P - 1}};
    T tiles(Shape(rows, slice_rows));
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      constexpr int64_t chunk_steps = kChunk / step_inputs(F);
      const int64_t steps = chunk + 1 < w.chunks ? chunk_steps : w.steps - chunk * chunk_steps;
      const int64_t first = chunk * (kChunk / kSlice), n = ceil_div(steps, slice_steps);
      const auto group = [&](int64_t s) { return (first + s) >> slices; };
      const int8_t* from = x.codes + row * x.stride + chunk * kChunk;
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = weights[p].next(steps, buffer);
        for (int64_t s = 0; s < n; s += 2) {
          slice<0, N>(tiles, from + kSlice * s, x.stride, at + 64 * slice_rows * s, of_chunk.dots[s]);
          if (s + 1 == n) break;
          slice<1, N>(tiles, from + kSlice * (s + 1), x.stride, at + 64 * slice_rows * (s + 1), of_chunk.dots[s + 1]);
        }
        if constexpr (F == Format::int4) {
          Floats of_w[kChunk / kSlice];
          const uint8_t* scales = w.scales + (panel + p) * w.groups * kPanel * 2;
          for (int64_t s = 0; s < n; ++s) of_w[s] = L::load_bf16(scales + group(s) * kPanel * 2);
          for (int64_t r = 0; r < rows; ++r) {
            const float* of_x = x.scales + (row + r) * x.slices + first;
            Floats sum = sums[p][r], of_group = L::floats(0);
            for (int64_t s = 0; s < n; ++s) {
              of_group = L::fma(L::to_floats(L::load(of_chunk.dots[s][r])), L::floats(of_x[s]), of_group);
              if (group(s + 1) == group(s) && s + 1 != n) continue;
              sum = L::fma(of_group, of_w[s], sum);
              of_group = L::floats(0);
            }
            sums[p][r] = sum;
          }
        } else {
          for (int64_t r = 0; r < rows; ++r) {
            const float* of_x = x.scales + (row + r) * x.slices + first;
            Floats sum = sums[p][r];
            for (int64_t s = 0; s < n; ++s) {
              sum = L::fma(L::to_floats(L::load(of_chunk.dots[s][r])), L::floats(of_x[s]), sum);
            }
            sums[p][r] = sum;
          }
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int64_t r = 0; r < rows; ++r) {
        Floats sum = sums[p][r];
        if constexpr (F == Format::int8) sum = L::multiply(sum, L::load_floats(w.scales + (panel + p) * kPanel * 4));
        L::store(out + r * stride + p * kPanel, sum);
      }
    }
  }

  template <Format F, int N, int P>
  static void tiles_of(const Matrix& w, int64_t panel, const Input& x, int64_t row, int64_t rows, float* out,
                       int64_t stride) {
    if constexpr (F == Format::bf16) {
      bf16<N, P>(w, panel, x, row, rows, out, stride);
    } else {
      codes<F, N, P>(w, panel, x, row, rows, out, stride);
    }
  }

  template <Format F>
  static void rows_of(const Matrix& w, int64_t panel, int64_t count, const Input& x, float* out, int64_t stride) {
    for (int64_t row = 0; row < x.rows; row += kManyRows) {
      const int64_t rows = x.rows - row < kManyRows ? x.rows - row : kManyRows;
      for (int64_t p = 0; p < count; p += 2) {
        const auto some = rows > kTileRows ? p + 1 < count ? tiles_of<F, 2, 2> : tiles_of<F, 2, 1>
                          : p + 1 < count  ? tiles_of<F, 1, 2>
                                           : tiles_of<F, 1, 1>;
        some(w, panel + p, x, row, rows, out + row * stride + p * kPanel, stride);
      }
    }
  }

  static void multiply(const Matrix& w, int64_t panel, int64_t count, const Input& x, float* out, int64_t stride,
                       uint8_t* scratch) {
    if (w.format == Format::bf16) return rows_of<Format::bf16>(w, panel, count, x, out, stride);
    if (x.rows <= kFewRows) return pliant::multiply<Avx512<L>>(w, panel, count, x, out, stride, scratch);
    if (w.format == Format::int8) return rows_of<Format::int8>(w, panel, count, x, out, stride);
    rows_of<Format::int4>(w, panel, count, x, out, stride);
  }
};

template <class L, class T>
Kernels amx_kernels_of(const char* name) {
  Kernels kernels = kernels_of<L>(name);
  kernels.multiply = Amx<L, T>::multiply;
  return kernels;
}

}  // namespace
}  // namespace pliant
