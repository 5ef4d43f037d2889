// Plain C++, for every processor, and the reference in tests of the other instruction sets.
#include <cmath>
#include <cstring>

#include "bf16.h"
#include "multiply.h"

namespace pliant {
namespace {

int nibble(int byte, int place) { return (((byte >> 4 * place) & 15) ^ 8) - 8; }

template <Format F, int R, int P>
struct SumOf {
  const Matrix& w;
  const int64_t panel;
  const Input& x;
  const int64_t row;
  float even[R][P][kPanel] = {}, odd[R][P][kPanel] = {};  // integers use the first alone

  SumOf(const Matrix& matrix, int64_t at, const Input& input, int64_t first)
      : w(matrix), panel(at), x(input), row(first) {}

  void add(const uint8_t* const (&values)[P], int64_t chunk, int64_t steps) {
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) {
        const int64_t begin = (row + r) * x.stride + chunk * kChunk;
        if constexpr (F == Format::bf16) {
          for (int64_t i = 0; i < steps; ++i) {
            const uint8_t* step = values[p] + kStepBytes * i;
            for (int64_t c = 0; c < kPanel; ++c) {
              even[r][p][c] += from_bf16(read<uint16_t>(step + 4 * c)) * x.values[begin + 2 * i];
              odd[r][p][c] += from_bf16(read<uint16_t>(step + 4 * c + 2)) * x.values[begin + 2 * i + 1];
            }
          }
        } else {
          constexpr int64_t slice_steps = kSlice / step_inputs(F);
          float of_group[kPanel] = {};
          for (int64_t first = 0; first < steps; first += slice_steps) {
            const int64_t end = first + slice_steps < steps ? first + slice_steps : steps;
            int32_t dots[kPanel] = {};
            for (int64_t i = first; i < end; ++i) {
              const int8_t* step = reinterpret_cast<const int8_t*>(values[p] + kStepBytes * i);
              for (int64_t c = 0; c < kPanel; ++c) {
                for (int64_t k = 0; k < 4; ++k) {
                  if constexpr (F == Format::int8) {
                    dots[c] += step[4 * c + k] * x.codes[begin + 4 * i + k];
                  } else {
                    dots[c] += nibble(step[4 * c + k], 0) * x.codes[begin + 8 * i + k];
                    dots[c] += nibble(step[4 * c + k], 1) * x.codes[begin + 8 * i + 4 + k];
                  }
                }
              }
            }
            const int64_t slice = chunk * (kChunk / kSlice) + first / slice_steps;
            const float scale = x.scales[(row + r) * x.slices + slice];
            float* sums = F == Format::int8 ? even[r][p] : of_group;
            for (int64_t c = 0; c < kPanel; ++c) sums[c] += static_cast<float>(dots[c]) * scale;
            if constexpr (F == Format::int4) {
              const int64_t slices = w.group / kSlice;
              if ((slice + 1) % slices && end != steps) continue;
              const uint8_t* scales = w.scales + ((panel + p) * w.groups + slice / slices) * kPanel * 2;
              for (int64_t c = 0; c < kPanel; ++c) {
                even[r][p][c] += of_group[c] * from_bf16(read<uint16_t>(scales + 2 * c));
                of_group[c] = 0;
              }
            }
          }
        }
      }
    }
  }

  void store(float* out, int64_t stride) const {
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) {
        for (int64_t c = 0; c < kPanel; ++c) {
          float sum = even[r][p][c] + odd[r][p][c];
          if constexpr (F == Format::int8) sum *= read<float>(w.scales + ((panel + p) * kPanel + c) * 4);
          out[r * stride + p * kPanel + c] = sum;
        }
      }
    }
  }
};

struct Scalar {
  template <Format F>
  static constexpr int paired = 1;
  template <Format F, int R>
  static constexpr bool fused = false;
  template <Format F, bool fused, int R, int P>
  using Sum = SumOf<F, R, P>;

  template <Format F>
  static const uint8_t* expand(const uint8_t* masks, const uint8_t* values, int64_t steps, uint8_t* out) {
    std::memset(out, 0, static_cast<size_t>(steps * kStepBytes));
    const int64_t elements = steps * mask_bytes(F) * 8;
    int64_t nibbles = 0;
    for (int64_t e = 0; e < elements; ++e) {
      if (!(masks[e >> 3] >> (e & 7) & 1)) continue;
      if constexpr (F == Format::bf16) {
        std::memcpy(out + 2 * e, values, 2);
        values += 2;
      } else if constexpr (F == Format::int8) {
        out[e] = *values++;
      } else {
        const int there = values[nibbles >> 1] >> 4 * (nibbles & 1) & 15;
        out[e >> 1] = static_cast<uint8_t>(out[e >> 1] | there << 4 * (e & 1));
        ++nibbles;
      }
    }
    return values + nibbles / 2;
  }
};

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? std::nanf("") : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(fraction + 1024), exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return bits & 0x8000 ? -size : size;
}

uint16_t float_to_half(float x) {
  const uint32_t bits = read<uint32_t>(&x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent;
  std::frexp(size, &exponent);                              // size = f * 2^exponent, f in [0.5, 1)
  const int lowest = exponent < -13 ? -24 : exponent - 11;  // the place of the last bit of the result
  const auto fraction =
      static_cast<int>(std::nearbyint(std::ldexp(size, -lowest)));  // up to 2048, which carries rightly
  const int field = exponent < -13 ? 0 : (exponent + 13) << 10;
  return static_cast<uint16_t>(sign | (size == 0 ? 0 : field + fraction));
}

void widen(const void* x, Type type, int64_t n, float* out, int64_t padded) {
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = type == Type::f32 ? uint16_t{0} : read<uint16_t>(static_cast<const uint16_t*>(x) + i);
    out[i] = type == Type::f32    ? static_cast<const float*>(x)[i]
             : type == Type::bf16 ? from_bf16(bits)
                                  : half_to_float(bits);
  }
  for (int64_t i = n; i < padded; ++i) out[i] = 0;
}

void narrow(const float* x, int64_t n, Type type, void* out) {
  for (int64_t i = 0; i < n; ++i) {
    switch (type) {
      case Type::f32:
        static_cast<float*>(out)[i] = x[i];
        break;
      case Type::bf16:
        static_cast<uint16_t*>(out)[i] = to_bf16(x[i]);
        break;
      case Type::f16:
        static_cast<uint16_t*>(out)[i] = float_to_half(x[i]);
        break;
    }
  }
}

void quantise(const float* x, int64_t padded, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t first = 0, g = 0; first < padded; first += kSlice, ++g) {
    const int64_t end = first + kSlice;
    uint32_t largest = 0;  // as integers, floats without their sign compare the same, and NaN is the largest
    for (int64_t i = first; i < end; ++i) {
      const uint32_t bits = read<uint32_t>(x + i) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    const Scale scale(largest);
    scales[g] = scale.value;
    sums[g] = 0;
    for (int64_t i = first; i < end; ++i) {
      const float code = std::nearbyint(x[i] * scale.inverse);
      codes[i] = static_cast<int8_t>(code == code ? code : 0);
      sums[g] += codes[i];
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels{"scalar", multiply<Scalar>, expand<Scalar>, widen,       narrow, quantise,
                               gate,     product,          largest_score,  exponentials};
  return kernels;
}

}  // namespace pliant
