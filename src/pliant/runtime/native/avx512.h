// Kernels for AVX-512 with VBMI2 and VNNI, in operations on 512 bits: `L` is one of the two kinds in lanes512.h.
//
// A step of the stream is a register. In a sparse one, VPEXPAND puts a step's values at the positions in its mask, and
// the step is multiplied at once, for up to four rows of x: nothing goes through memory. Dot products multiply unsigned
// bytes with signed ones, so codes of W are shifted to 0 and up. That adds a multiple of the sum of x, which is
// subtracted again.
//
// bf16 is summed as in AVX2, even and odd inputs apart. In int8 and int4 the sum of a slice is an integer, and slices
// are added in AVX2's order, too: all formats have the results of AVX2, to the bit.
#pragma once

#include "lanes512.h"
#include "multiply.h"

namespace pliant {
namespace {

constexpr int64_t kAhead = 2048;  // bytes that a stream is fetched before its use

// Registers that a step fills: in int4 there are two codes in a byte.
constexpr int registers(Format f) { return f == Format::int4 ? 2 : 1; }

// Codes as they are multiplied: unsigned. int4: of the lower halves of bytes.
template <class L, Format F>
struct Code {
  using Ints = typename L::Ints;
  static Ints zero() {
    if constexpr (F == Format::bf16) return L::zeros();
    return L::ints(F == Format::int8 ? static_cast<int32_t>(0x80808080) : 0x08080808);
  }
  static Ints of(Ints v) {
    if constexpr (F == Format::bf16) return v;
    if constexpr (F == Format::int8) return L::exclusive_or(v, zero());
    return L::both_xor(v, L::ints(0x0f0f0f0f), zero());
  }
};

// The next steps of P dense streams, G of each. int4: inputs 0 to 3 of all outputs, then 4 to 7.
template <class L, Format F, int P>
struct Dense {
  static constexpr bool sparse = false;
  const uint8_t* values[P];

  template <int G>
  [[gnu::always_inline]] void take(typename L::Ints (&out)[G * P * registers(F)]) {
    constexpr int n = registers(F);
    for (int g = 0; g < G; ++g) {
      for (int p = 0; p < P; ++p) {
        const uint8_t* from = values[p] + kStepBytes * g;
        L::prefetch(from + kAhead);
        const auto step = L::load(from);
        out[(g * P + p) * n] = Code<L, F>::of(step);
        if constexpr (n == 2) out[(g * P + p) * n + 1] = Code<L, F>::of(L::right4(step));
      }
    }
    for (auto& at : values) at += kStepBytes * G;
  }
};

// The same of sparse ones. int4: in the order of the stream, inputs 0 4 1 5 2 6 3 7 of outputs 0 to 7, then of 8 to 15.
template <class L, Format F, int P>
struct Sparse {
  static constexpr bool sparse = true;
  const uint8_t* masks[P];
  const uint8_t* values[P];

  template <int G>
  [[gnu::always_inline]] void take(typename L::Ints (&out)[G * P * registers(F)]) {
    const auto zero = Code<L, F>::zero();
    for (int g = 0; g < G; ++g) {
      for (int p = 0; p < P; ++p) {
        const uint8_t* from = masks[p] + mask_bytes(F) * g;
        if (g % 2 == 0) L::prefetch(values[p] + kAhead);
        if constexpr (F == Format::bf16) {
          const auto mask = read<uint32_t>(from);
          out[g * P + p] = L::expand16(zero, mask, L::load(values[p]));
          values[p] += 2 * int64_t{__builtin_popcount(mask)};
        } else if constexpr (F == Format::int8) {
          const auto mask = read<uint64_t>(from);
          out[g * P + p] = L::expand8(zero, mask, Code<L, F>::of(L::load(values[p])));
          values[p] += __builtin_popcountll(mask);
        } else {
          for (int h = 0; h < 2; ++h) {
            const auto mask = read<uint64_t>(from + 8 * h);
            out[2 * (g * P + p) + h] = L::expand8(zero, mask, Code<L, F>::of(L::nibbles(values[p])));
            values[p] += __builtin_popcountll(mask) >> 1;
          }
        }
      }
    }
    for (auto& at : masks) at += mask_bytes(F) * G;
  }
};

// Both kinds of stream, for a sum that processes the steps: `run(from, chunk, steps)`.
template <class Sum, class L, Format F, int P>
struct Streams {
  void add(const uint8_t* const (&w)[P], int64_t chunk, int64_t steps) {
    Dense<L, F, P> from;
    for (int p = 0; p < P; ++p) from.values[p] = w[p];
    static_cast<Sum*>(this)->run(from, chunk, steps);
  }
  void add(const uint8_t* (&masks)[P], const uint8_t* (&values)[P], int64_t chunk, int64_t steps) {
    Sparse<L, F, P> from;
    for (int p = 0; p < P; ++p) from.masks[p] = masks[p], from.values[p] = values[p];
    static_cast<Sum*>(this)->run(from, chunk, steps);
    for (int p = 0; p < P; ++p) masks[p] = from.masks[p], values[p] = from.values[p];
  }
};

template <class L, Format F, int R, int P>
struct SumOf;

template <class L, int R, int P>
struct SumOf<L, Format::bf16, R, P> : Streams<SumOf<L, Format::bf16, R, P>, L, Format::bf16, P> {
  using Ints = typename L::Ints;
  using Floats = typename L::Floats;
  Rows<R> x;
  Floats even[R][P], odd[R][P];

  SumOf(const Matrix&, int64_t, const Input& input, int64_t row) : x(input, row) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) even[r][p] = odd[r][p] = L::floats(0);
  }

  template <int G, class From>
  [[gnu::always_inline]] void step(From& from, const float* const (&at)[R], int64_t k) {
    const Ints upper = L::ints(static_cast<int32_t>(0xffff0000));
    Ints w[G * P];
    from.template take<G>(w);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        const Floats w0 = L::as_floats(L::left16(w[g * P + p]));
        const Floats w1 = L::as_floats(L::both(w[g * P + p], upper));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          even[r][p] = L::fma(w0, L::floats(at[r][k + 2 * g]), even[r][p]);
          odd[r][p] = L::fma(w1, L::floats(at[r][k + 2 * g + 1]), odd[r][p]);
        }
      }
    }
  }

  template <class From>
  void run(From& stream, int64_t chunk, int64_t steps) {
    constexpr int G = 4 / P;
    From from = stream;  // all of it in registers
    const float* at[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) at[r] = x.values[r] + chunk * kChunk;
    int64_t i = 0;
    for (; i + G <= steps; i += G) step<G>(from, at, 2 * i);
    for (; i < steps; ++i) step<1>(from, at, 2 * i);
    stream = from;
  }

  void store(float* out, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) L::store(out + r * stride + p * kPanel, L::add(even[r][p], odd[r][p]));
  }
};

// Codes from 0 to 255, 128 more than they are.
template <class L, int R, int P>
struct SumOf<L, Format::int8, R, P> : Streams<SumOf<L, Format::int8, R, P>, L, Format::int8, P> {
  using Ints = typename L::Ints;
  using Floats = typename L::Floats;
  Rows<R> x;
  const uint8_t* scales;
  Floats sums[R][P];

  SumOf(const Matrix& w, int64_t panel, const Input& input, int64_t row)
      : x(input, row), scales(w.scales + panel * kPanel * 4) {
    for (auto& row_sums : sums)
      for (auto& sum : row_sums) sum = L::floats(0);
  }

  template <int G, class From>
  [[gnu::always_inline]] static void step(From& from, const int8_t* const (&at)[R], int64_t k, Ints (&dots)[R][P]) {
    Ints w[G * P];
    from.template take<G>(w);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) dots[r][p] = L::dot(dots[r][p], w[g * P + p], L::four(at[r] + k + 4 * g));
      }
    }
  }

  template <class From>
  void run(From& stream, int64_t chunk, int64_t steps) {
    constexpr int64_t slice_steps = kSlice / 4;
    constexpr int G = 4 / P;
    From from = stream;
    int64_t slice = chunk * (kChunk / kSlice);
    for (int64_t begin = 0; begin < steps; begin += slice_steps, ++slice) {
      const int64_t n = steps - begin < slice_steps ? steps - begin : slice_steps;
      Ints dots[R][P];
      const int8_t* at[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        at[r] = x.codes[r] + slice * kSlice;
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) dots[r][p] = L::ints(-128 * x.sums[r][slice]);
      }
      int64_t i = 0;
      for (; i + G <= n; i += G) step<G>(from, at, 4 * i, dots);
      for (; i < n; ++i) step<1>(from, at, 4 * i, dots);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Floats scale = L::floats(x.scales[r][slice]);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[r][p] = L::fma(L::to_floats(dots[r][p]), scale, sums[r][p]);
      }
    }
    stream = from;
  }

  void store(float* out, int64_t stride) const {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const Floats scale = L::load_floats(scales + p * kPanel * 4);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) L::store(out + r * stride + p * kPanel, L::multiply(sums[r][p], scale));
    }
  }
};

struct Order {  // of 16 bytes: 0 4 1 5 2 6 3 7, and so for the next eight
  alignas(64) int8_t from[64];
  constexpr Order() : from() {
    for (int i = 0; i < 64; ++i) from[i] = static_cast<int8_t>((i & 8) + (i & 1) * 4 + (i >> 1 & 3));
  }
};
constexpr Order mixed_order;

// Codes from 0 to 15, 8 more than they are. Of a dense step, the first register holds inputs 0 to 3 of all outputs and
// the second one 4 to 7; of a sparse one, the first holds all inputs of outputs 0 to 7, two sums for each. x is laid
// out to match.
template <class L, int R, int P>
struct SumOf<L, Format::int4, R, P> : Streams<SumOf<L, Format::int4, R, P>, L, Format::int4, P> {
  using Ints = typename L::Ints;
  using Floats = typename L::Floats;
  Rows<R> x;
  const int slices;  // in a group, as a power of 2
  const uint8_t* scales[P];
  Floats sums[R][P];

  SumOf(const Matrix& w, int64_t panel, const Input& input, int64_t row)
      : x(input, row), slices(__builtin_ctzll(static_cast<uint64_t>(w.group / kSlice))) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) scales[p] = w.scales + (panel + p) * w.groups * kPanel * 2;
    for (auto& row_sums : sums)
      for (auto& sum : row_sums) sum = L::floats(0);
  }

  template <int G, class From>
  [[gnu::always_inline]] static void step(From& from, const int8_t* const (&at)[R], int64_t k, Ints (&dots)[R][P][2]) {
    Ints w[G * P * 2];
    from.template take<G>(w);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const int8_t* eight = at[r] + k + 8 * g;
            const Ints inputs = From::sparse ? L::eight(eight) : L::four(eight + 4 * h);
            dots[r][p][h] = L::dot(dots[r][p][h], w[2 * (g * P + p) + h], inputs);
          }
        }
      }
    }
  }

  template <class From>
  void run(From& stream, int64_t chunk, int64_t steps) {
    constexpr int64_t slice_steps = kSlice / 8;
    constexpr int G = 2 / P;
    From from = stream;
    alignas(64) int8_t mixed[R][From::sparse ? kChunk : 1];  // inputs 0 4 1 5 2 6 3 7 of every 8
    if constexpr (From::sparse) {
      const Ints order = L::load(mixed_order.from);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        for (int64_t k = 0; k < 8 * steps; k += 64)
          L::store(mixed[r] + k, L::shuffle(L::load(x.codes[r] + chunk * kChunk + k), order));
    }
    Floats of_group[R][P];
    for (auto& row_sums : of_group)
      for (auto& sum : row_sums) sum = L::floats(0);
    int64_t slice = chunk * (kChunk / kSlice);
    for (int64_t begin = 0; begin < steps; begin += slice_steps, ++slice) {
      const int64_t n = steps - begin < slice_steps ? steps - begin : slice_steps;
      Ints dots[R][P][2];
      const int8_t* at[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        at[r] = From::sparse ? mixed[r] + 8 * begin : x.codes[r] + slice * kSlice;
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) dots[r][p][0] = dots[r][p][1] = L::ints(-4 * x.sums[r][slice]);
      }
      int64_t i = 0;
      for (; i + G <= n; i += G) step<G>(from, at, 8 * i, dots);
      for (; i < n; ++i) step<1>(from, at, 8 * i, dots);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Floats scale = L::floats(x.scales[r][slice]);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          const Ints first = dots[r][p][0], second = dots[r][p][1];
          const Ints dot =
              From::sparse ? L::add(L::evens(first, second), L::odds(first, second)) : L::add(first, second);
          of_group[r][p] = L::fma(L::to_floats(dot), scale, of_group[r][p]);
        }
      }
      const int64_t group = slice >> slices;
      if ((slice + 1) >> slices == group && begin + n != steps) continue;
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        const Floats scale = L::load_bf16(scales[p] + group * kPanel * 2);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[r][p] = L::fma(of_group[r][p], scale, sums[r][p]);
          of_group[r][p] = L::floats(0);
        }
      }
    }
    stream = from;
  }

  void store(float* out, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) L::store(out + r * stride + p * kPanel, sums[r][p]);
  }
};

template <class L>
struct Avx512 {
  template <Format F>
  static constexpr int paired = 2;
  template <Format F, int R>
  static constexpr bool fused = true;
  template <Format F, bool, int R, int P>
  using Sum = SumOf<L, F, R, P>;

  template <Format F>
  static const uint8_t* expand(const uint8_t* masks, const uint8_t* values, int64_t steps, uint8_t* out) {
    constexpr int G = 4 / registers(F);
    Sparse<L, F, 1> from{{masks}, {values}};
    int64_t i = 0;
    for (; i + G <= steps; i += G) expand_steps<G>(from, out + kStepBytes * i);
    for (; i < steps; ++i) expand_steps<1>(from, out + kStepBytes * i);
    return from.values[0];
  }

 private:
  template <int G, Format F>
  [[gnu::always_inline]] static void expand_steps(Sparse<L, F, 1>& from, uint8_t* out) {
    typename L::Ints w[G * registers(F)];
    from.template take<G>(w);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      if constexpr (F == Format::bf16) {
        L::store(out + kStepBytes * g, w[g]);
      } else if constexpr (F == Format::int8) {
        L::store(out + kStepBytes * g, Code<L, F>::of(w[g]));
      } else {  // two codes into the lower byte of every two, then those bytes side by side
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) w[2 * g + h] = L::either(w[2 * g + h], L::right4(w[2 * g + h]));
        const auto codes = L::even_bytes(w[2 * g], w[2 * g + 1]);
        L::store(out + kStepBytes * g, L::exclusive_or(codes, L::ints(static_cast<int32_t>(0x88888888))));
      }
    }
  }
};

// Calls `whole(at)` for every 16 of n elements, and `part(at, count)` for the rest.
template <class Whole, class Part>
void by_sixteen(int64_t n, Whole whole, Part part) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) whole(i);
  if (i < n) part(i, static_cast<size_t>(n - i));
}

template <class L>
void widen(const void* x, Type type, int64_t n, float* out, int64_t padded) {
  if (type == Type::f32) {
    std::memcpy(out, x, static_cast<size_t>(n) * 4);
  } else {
    const auto* from = static_cast<const uint16_t*>(x);
    const auto floats = [type](const void* p) { return type == Type::bf16 ? L::load_bf16(p) : L::load_f16(p); };
    by_sixteen(
        n, [&](int64_t i) { L::store(out + i, floats(from + i)); },
        [&](int64_t i, size_t count) {
          uint16_t some[16] = {};
          std::memcpy(some, from + i, 2 * count);
          const auto wide = floats(some);
          std::memcpy(out + i, &wide, 4 * count);
        });
  }
  for (int64_t i = n; i < padded; ++i) out[i] = 0;
}

template <class L>
void narrow(const float* x, int64_t n, Type type, void* out) {
  if (type == Type::f32) {
    std::memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  auto* to = static_cast<uint16_t*>(out);
  const auto store = [type](void* p, const float* from) {
    type == Type::bf16 ? L::store_bf16(p, L::load_floats(from)) : L::store_f16(p, L::load_floats(from));
  };
  by_sixteen(
      n, [&](int64_t i) { store(to + i, x + i); },
      [&](int64_t i, size_t count) {
        float some[16] = {};
        std::memcpy(some, x + i, 4 * count);
        uint16_t halves[16];
        store(halves, some);
        std::memcpy(to + i, halves, 2 * count);
      });
}

template <class L>
void quantise(const float* x, int64_t padded, int8_t* codes, float* scales, int32_t* sums) {
  const auto unsigned_bits = L::ints(0x7fffffff);
  for (int64_t g = 0; g * kSlice < padded; ++g) {
    const float* from = x + g * kSlice;
    // as integers, floats without their sign compare the same, and NaN is the largest
    const auto most = L::largest(L::both(L::load(from), unsigned_bits), L::both(L::load(from + 16), unsigned_bits));
    const Scale scale(L::most(most));
    const auto inverse = L::floats(scale.inverse);
    const auto first = L::to_ints(L::multiply(L::load_floats(from), inverse));
    const auto second = L::to_ints(L::multiply(L::load_floats(from + 16), inverse));
    L::store_bytes(codes + g * kSlice, first);
    L::store_bytes(codes + g * kSlice + 16, second);
    scales[g] = scale.value;
    sums[g] = L::total(L::add(first, second));
  }
}
static_assert(kSlice == 32);

template <class L>
Kernels kernels_of(const char* name) {
  using I = Avx512<L>;
  return {name, multiply<I>, expand<I>, widen<L>, narrow<L>, quantise<L>, gate, product, largest_score, exponentials};
}

}  // namespace
}  // namespace pliant
