// The eight tiles of AMX, twice: those of the processor, and in plain C++ for tests on processors without them. Both
// give the same bits.
//
// All kernels use them in the same way: 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights. Tiles 0, 1 and 4 are for
// the first 16 rows of x, tiles 2, 3 and 5 for the next 16. A thread owns its tiles as long as the object lives.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

namespace pliant {
namespace {

constexpr int64_t kTileRows = 16;

struct Shape {
  uint8_t palette = 1;
  uint8_t unused[15] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};

  // `rows_of_x` is at most 32. `depth` rows of weights are multiplied with `depth` times 4 bytes of x.
  Shape(int64_t rows_of_x, int64_t depth) {
    for (int half = 0; half < 2; ++half) {
      const int64_t left = rows_of_x - half * kTileRows;
      if (left <= 0) break;  // such a tile has no rows, and is not used
      const auto n = static_cast<uint8_t>(left < kTileRows ? left : kTileRows);
      for (int tile = 2 * half; tile < 2 * half + 2; ++tile) rows[tile] = n, bytes[tile] = 64;
      rows[4 + half] = n;
      bytes[4 + half] = static_cast<uint16_t>(4 * depth);
    }
    for (int tile = 6; tile < 8; ++tile) rows[tile] = static_cast<uint8_t>(depth), bytes[tile] = 64;
  }
};
static_assert(sizeof(Shape) == 64);

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)

// In assembly, because GCC's own functions do not declare that tiles are loaded from and stored to memory.
struct Hardware {
  explicit Hardware(const Shape& shape) { asm volatile("ldtilecfg %0" : : "m"(shape)); }
  ~Hardware() { asm volatile("tilerelease"); }
  Hardware(const Hardware&) = delete;
  Hardware& operator=(const Hardware&) = delete;

  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int sum, int x, int w>
  void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
  template <int sum, int x, int w>
  void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
};

#endif

struct Software {
  explicit Software(const Shape& s) : shape(s) {
    expect(s.palette == 1);
    for (const uint8_t byte : s.unused) expect(byte == 0);
    for (int t = 0; t < 16; ++t) expect(s.rows[t] <= 16 && s.bytes[t] <= 64 && (s.rows[t] == 0) == (s.bytes[t] == 0));
    for (int t = 8; t < 16; ++t) expect(s.rows[t] == 0);
  }
  Software(const Software&) = delete;
  Software& operator=(const Software&) = delete;

  template <int tile>
  void zero() {
    expect(shape.rows[tile] != 0);
    std::memset(data[tile], 0, sizeof data[tile]);
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    zero<tile>();
    for (int r = 0; r < shape.rows[tile]; ++r) {
      std::memcpy(data[tile][r], static_cast<const uint8_t*>(from) + r * stride, shape.bytes[tile]);
    }
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    expect(shape.rows[tile] != 0);
    for (int r = 0; r < shape.rows[tile]; ++r) {
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, data[tile][r], shape.bytes[tile]);
    }
  }
  // Even and odd inputs of a tile apart, from 0 on; then both, then the sum so far. Numbers below 2^-126 count as zero.
  template <int sum, int x, int w>
  void dot_bf16() {
    each<sum, x, w>([](const uint8_t* row, const uint8_t* column, int depth, const uint8_t* so_far) {
      float parts[2] = {};
      for (int k = 0; k < depth; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float a = wide(row + 4 * k + 2 * i), b = wide(column + 64 * k + 2 * i);
          parts[i] = flushed(__builtin_fmaf(a, b, parts[i]));
        }
      }
      const float part = flushed(parts[0] + parts[1]);
      return bits(flushed(flushed(read_as<float>(so_far)) + part));
    });
  }
  template <int sum, int x, int w>
  void dot_int8() {
    each<sum, x, w>([](const uint8_t* row, const uint8_t* column, int depth, const uint8_t* so_far) {
      auto out = read_as<uint32_t>(so_far);  // overflow wraps around
      for (int k = 0; k < depth; ++k) {
        for (int i = 0; i < 4; ++i) {
          out += static_cast<uint32_t>(static_cast<int8_t>(row[4 * k + i]) * static_cast<int8_t>(column[64 * k + i]));
        }
      }
      return out;
    });
  }

 private:
  const Shape shape;
  uint8_t data[8][16][64] = {};

  static void expect(bool holds) {  // fails as the processor would
    if (!holds) __builtin_trap();
  }
  template <class T>
  static T read_as(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static uint32_t bits(float x) { return read_as<uint32_t>(&x); }
  static float flushed(float x) {
    const uint32_t all = bits(x), sign = all & 0x80000000;
    return all & 0x7f800000 ? x : read_as<float>(&sign);
  }
  static float wide(const uint8_t* p) { return flushed(from_bf16(read_as<uint16_t>(p))); }
  template <int sum, int x, int w, class F>
  void each(F f) {
    const int rows = shape.rows[sum], columns = shape.bytes[sum] / 4, depth = shape.bytes[x] / 4;
    expect(rows != 0 && depth != 0 && shape.rows[x] == rows && shape.rows[w] == depth &&
           shape.bytes[w] == shape.bytes[sum]);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        const uint32_t out = f(data[x][r], data[w][0] + 4 * c, depth, data[sum][r] + 4 * c);
        std::memcpy(data[sum][r] + 4 * c, &out, 4);
      }
    }
  }
};

}  // namespace
}  // namespace pliant
