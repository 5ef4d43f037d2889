// AVX2 with FMA, F16C, BMI2 and POPCNT.
//
// AVX2 has no instruction that spreads packed elements over the positions in a mask. A byte shuffle from a table of 256
// patterns moves 16-bit elements, straight into the upper halves of floats if one row is multiplied; PDEP moves 8- and
// 4-bit ones, eight bytes at a time, into masks that vectors widen from bits. On most cores both are slower than
// memory: here, sparse int8 and int4 save memory and seldom time.
#include <immintrin.h>

#include <cstring>

#include "bf16.h"
#include "multiply.h"

namespace pliant {
namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
__m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// A line of a stream is fetched 1024 bytes before its use: the processor's own prefetching does not keep memory busy,
// least of all at the beginning of a panel. If two panels are read at once, the one after the next follows. At the end
// of a small matrix, the line of the following matrix is fetched.
template <int P>
struct Ahead {
  int64_t last, bytes, in_last;
  explicit Ahead(const Matrix& w)
      : last(w.chunks - 1),
        bytes(w.following ? w.following : 1024),
        in_last(w.following ? w.following : 1024 + (P - 1) * w.steps * kStepBytes) {}
  int64_t in(int64_t chunk) const { return chunk == last ? in_last : bytes; }
};
void fetch(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0); }

__m256 bf16_to_float(const uint8_t* p) {  // 8 of them
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
}

// The source of each byte of a byte shuffle, for every mask of 8 elements of 16 bits.
struct Tables {
  // element i into the upper half of float i; both lanes have the same 16 source bytes
  alignas(32) uint8_t upper[256][32];
  alignas(16) uint8_t pairs[256][16];  // element i into element i
  constexpr Tables() : upper(), pairs() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0, from = 0; i < 8; ++i) {
        const bool there = mask >> i & 1;
        upper[mask][4 * i] = upper[mask][4 * i + 1] = 0x80;
        upper[mask][4 * i + 2] = pairs[mask][2 * i] = static_cast<uint8_t>(there ? 2 * from : 0x80);
        upper[mask][4 * i + 3] = pairs[mask][2 * i + 1] = static_cast<uint8_t>(there ? 2 * from + 1 : 0x80);
        from += there;
      }
    }
  }
};
constexpr Tables tables;  // constexpr, because the processor that loads the library may lack AVX2

template <Format F, bool fused, int R, int P>
struct SumOf;

// Even and odd inputs are summed next to each other, 4 outputs in a register, and added at the end.
template <bool fused, int R, int P>
struct SumOf<Format::bf16, fused, R, P> {
  Rows<R> x;
  Ahead<P> ahead;
  __m256 sums[R][P][4];

  SumOf(const Matrix& w, int64_t, const Input& input, int64_t row) : x(input, row), ahead(w) {
#pragma GCC unroll 4
    for (auto& rows : sums)
#pragma GCC unroll 2
      for (auto& panels : rows)
#pragma GCC unroll 4
        for (auto& sum : panels) sum = _mm256_setzero_ps();
  }

  static __m256 pair(const float* at) {
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(at)));
  }

  // Of all steps the halves from `begin` to `end`; the first half fetches.
  template <int begin, int end>
  void add_halves(const uint8_t* const (&w)[P], int64_t first, int64_t steps, int64_t bytes) {
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        if (begin == 0) fetch(w[p] + kStepBytes * i + bytes);
#pragma GCC unroll 2
        for (int h = begin; h < end; ++h) {
          const __m256i both = load(w[p] + kStepBytes * i + 32 * h);
          const __m256 low = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), both));
          const __m256 high = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), both));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const __m256 inputs = pair(x.values[r] + first + 2 * i);
            sums[r][p][2 * h] = _mm256_fmadd_ps(low, inputs, sums[r][p][2 * h]);
            sums[r][p][2 * h + 1] = _mm256_fmadd_ps(high, inputs, sums[r][p][2 * h + 1]);
          }
        }
      }
    }
  }

  void add(const uint8_t* const (&w)[P], int64_t chunk, int64_t steps) {
    if constexpr (R * P <= 2) {
      add_halves<0, 2>(w, chunk * kChunk, steps, ahead.in(chunk));
    } else {  // all sums would take more registers than there are
      add_halves<0, 1>(w, chunk * kChunk, steps, ahead.in(chunk));
      add_halves<1, 2>(w, chunk * kChunk, steps, 0);
    }
  }

  void add(const uint8_t* (&masks)[P], const uint8_t* (&values)[P], int64_t chunk, int64_t steps) {
    static_assert(fused && R == 1);
    const uint8_t *m[P], *v[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) m[p] = masks[p], v[p] = values[p];
    for (int64_t i = 0; i < steps; ++i) {
      const __m256 inputs = pair(x.values[0] + chunk * kChunk + 2 * i);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        // Each byte of the mask times 32, the size of a pattern, in 16 bits of its own.
        const uint64_t mask = _pdep_u64(read<uint32_t>(m[p] + 4 * i), 0x1fe01fe01fe01fe0);
        const uint64_t at[4] = {mask & 0xffff, mask >> 16 & 0xffff, mask >> 32 & 0xffff, mask >> 48};
        const int64_t all = _mm_popcnt_u64(mask);
        const int64_t before[4] = {0, _mm_popcnt_u64(at[0]), _mm_popcnt_u32(static_cast<uint32_t>(mask)),
                                   all - _mm_popcnt_u64(at[3])};
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const __m256i there = _mm256_broadcastsi128_si256(load16(v[p] + 2 * before[q]));
          const __m256i weights = _mm256_shuffle_epi8(there, load(tables.upper[0] + at[q]));
          sums[0][p][q] = _mm256_fmadd_ps(_mm256_castsi256_ps(weights), inputs, sums[0][p][q]);
        }
        v[p] += 2 * all;
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) masks[p] = m[p] + 4 * steps, values[p] = v[p];
  }

  void store(float* out, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const __m256 sum = _mm256_hadd_ps(sums[r][p][q], sums[r][p][q]);
          // Dense ones are of outputs 0, 1, 4, 5 and 2, 3, 6, 7 of a half: unpacking takes 16 bytes at a time.
          float* first = out + r * stride + p * kPanel + (fused ? 4 * q : 8 * (q / 2) + 2 * (q % 2));
          _mm_storel_pi(reinterpret_cast<__m64*>(first), _mm256_castps256_ps128(sum));
          _mm_storel_pi(reinterpret_cast<__m64*>(first + (fused ? 2 : 4)), _mm256_extractf128_ps(sum, 1));
        }
      }
    }
  }
};

// |w| times x with the sign of w, so that products of bytes stay within 16 bits.
template <int R, int P>
struct SumOf<Format::int8, false, R, P> {
  Rows<R> x;
  Ahead<P> ahead;
  const uint8_t* scales;
  __m256 sums[R][P][2];

  SumOf(const Matrix& w, int64_t panel, const Input& input, int64_t row)
      : x(input, row), ahead(w), scales(w.scales + panel * kPanel * sizeof(float)) {
    for (auto& rows : sums)
      for (auto& panels : rows) panels[0] = panels[1] = _mm256_setzero_ps();
  }

  void add(const uint8_t* const (&w)[P], int64_t chunk, int64_t steps) {
    constexpr int64_t slice_steps = kSlice / 4;
    const int64_t bytes = ahead.in(chunk);
    const __m256i one = _mm256_set1_epi16(1);
    for (int64_t begin = 0; begin < steps; begin += slice_steps) {
      const int64_t end = begin + slice_steps < steps ? begin + slice_steps : steps;
      const int64_t slice = chunk * (kChunk / kSlice) + begin / slice_steps;
      __m256i dots[R][P][2];
      for (auto& rows : dots)
        for (auto& panels : rows) panels[0] = panels[1] = _mm256_setzero_si256();
      for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          fetch(w[p] + kStepBytes * i + bytes);
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i code = load(w[p] + kStepBytes * i + 32 * h);
            const __m256i size = _mm256_abs_epi8(code);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              const __m256i four = _mm256_set1_epi32(read<int32_t>(x.codes[r] + chunk * kChunk + 4 * i));
              const __m256i products = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four, code));
              dots[r][p][h] = _mm256_add_epi32(dots[r][p][h], _mm256_madd_epi16(products, one));
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256 scale = _mm256_broadcast_ss(x.scales[r] + slice);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h)
            sums[r][p][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][p][h]), scale, sums[r][p][h]);
      }
    }
  }

  void store(float* out, int64_t stride) const {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = _mm256_castsi256_ps(load(scales + (p * kPanel + 8 * h) * sizeof(float)));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          _mm256_storeu_ps(out + r * stride + p * kPanel + 8 * h, _mm256_mul_ps(sums[r][p][h], scale));
      }
    }
  }
};

// Nibbles as code + 8, between 0 and 15: the products of a slice, eight a lane, fit into 16 bits.
template <int R, int P>
struct SumOf<Format::int4, false, R, P> {
  Rows<R> x;
  Ahead<P> ahead;
  const int slices;  // in a group, as a power of 2
  const uint8_t* scales[P];
  __m256 sums[R][P][2];

  SumOf(const Matrix& w, int64_t panel, const Input& input, int64_t row)
      : x(input, row), ahead(w), slices(__builtin_ctzll(static_cast<uint64_t>(w.group / kSlice))) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) scales[p] = w.scales + (panel + p) * w.groups * kPanel * 2;
    for (auto& rows : sums)
      for (auto& panels : rows) panels[0] = panels[1] = _mm256_setzero_ps();
  }

  void add(const uint8_t* const (&w)[P], int64_t chunk, int64_t steps) {
    constexpr int64_t slice_steps = kSlice / 8;
    const int64_t bytes = ahead.in(chunk);
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i eights = _mm256_set1_epi8(static_cast<char>(0x88));
    const __m256i one = _mm256_set1_epi16(1);
    __m256 of_group[R][P][2];
    for (auto& rows : of_group)
      for (auto& panels : rows) panels[0] = panels[1] = _mm256_setzero_ps();
    for (int64_t begin = 0; begin < steps; begin += slice_steps) {
      const int64_t end = begin + slice_steps < steps ? begin + slice_steps : steps;
      const int64_t slice = chunk * (kChunk / kSlice) + begin / slice_steps;
      __m256i half[R][P][2];
      for (auto& rows : half)
        for (auto& panels : rows) panels[0] = panels[1] = _mm256_setzero_si256();
      for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          fetch(w[p] + kStepBytes * i + bytes);
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i both = _mm256_xor_si256(load(w[p] + kStepBytes * i + 32 * h), eights);
            const __m256i first = _mm256_and_si256(both, low);
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              const int8_t* codes = x.codes[r] + chunk * kChunk + 8 * i;
              const __m256i four = _mm256_set1_epi32(read<int32_t>(codes));
              const __m256i next = _mm256_set1_epi32(read<int32_t>(codes + 4));
              half[r][p][h] = _mm256_add_epi16(half[r][p][h], _mm256_maddubs_epi16(first, four));
              half[r][p][h] = _mm256_add_epi16(half[r][p][h], _mm256_maddubs_epi16(second, next));
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i surplus = _mm256_set1_epi32(8 * x.sums[r][slice]);
        const __m256 scale = _mm256_broadcast_ss(x.scales[r] + slice);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i dots = _mm256_sub_epi32(_mm256_madd_epi16(half[r][p][h], one), surplus);
            of_group[r][p][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, of_group[r][p][h]);
          }
        }
      }
      const int64_t of_w = slice >> slices;
      if ((slice + 1) >> slices == of_w && end != steps) continue;
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256 scale = bf16_to_float(scales[p] + (of_w * kPanel + 8 * h) * 2);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            sums[r][p][h] = _mm256_fmadd_ps(of_group[r][p][h], scale, sums[r][p][h]);
            of_group[r][p][h] = _mm256_setzero_ps();
          }
        }
      }
    }
  }

  void store(float* out, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + r * stride + p * kPanel + 8 * h, sums[r][p][h]);
  }
};

struct Avx2 {
  template <Format F>
  static constexpr int paired = F == Format::bf16 ? 1 : 2;
  template <Format F, int R>
  static constexpr bool fused = F == Format::bf16 && R == 1;
  template <Format F, bool fused, int R, int P>
  using Sum = SumOf<F, fused, R, P>;

  // The bits of the codes in 32 bytes, each widened to a code.
  template <Format F>
  static __m256i widened(const uint8_t* masks) {
    if constexpr (F == Format::int8) {
      const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
      const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
      const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(read<int32_t>(masks)), byte), bit);
      return _mm256_cmpeq_epi8(bits, bit);
    } else {  // two bits a byte: 0-1 or 2-3 of its half of a byte of masks, looked up
      const __m256i halves =
          _mm256_srlv_epi64(_mm256_set1_epi64x(read<int64_t>(masks)), _mm256_setr_epi64x(0, 4, 0, 4));
      const __m256i byte = _mm256_setr_epi32(0x08080000, 0x09090101, 0x0a0a0202, 0x0b0b0303, 0x0c0c0404, 0x0d0d0505,
                                             0x0e0e0606, 0x0f0f0707);
      const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(halves, byte), _mm256_set1_epi16(0x0c03));
      const __m128i nibbles = _mm_setr_epi8(0, 0x0f, -0x10, -1, 0x0f, 0, 0, 0, -0x10, 0, 0, 0, -1, 0, 0, 0);
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(nibbles), bits);
    }
  }

  // The number of value bytes before each eight of 32 bytes, and in total.
  template <Format F>
  static void places(const uint8_t* masks, int64_t (&before)[5]) {
    before[0] = 0;
    if constexpr (F == Format::int8) {
      const uint32_t mask = read<uint32_t>(masks);
      before[1] = _mm_popcnt_u32(mask & 0xff);
      before[2] = _mm_popcnt_u32(mask & 0xffff);
      before[3] = _mm_popcnt_u32(mask << 8);
      before[4] = _mm_popcnt_u32(mask);
    } else {
      const uint64_t mask = read<uint64_t>(masks);
      before[1] = _mm_popcnt_u64(mask & 0xffff) >> 1;
      before[2] = _mm_popcnt_u32(static_cast<uint32_t>(mask)) >> 1;
      before[3] = _mm_popcnt_u64(mask << 16) >> 1;
      before[4] = _mm_popcnt_u64(mask) >> 1;
    }
  }

  template <Format F>
  static const uint8_t* expand(const uint8_t* masks, const uint8_t* values, int64_t steps, uint8_t* out) {
    if constexpr (F == Format::bf16) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4 * steps; ++i) {
        const __m128i pattern = _mm_load_si128(reinterpret_cast<const __m128i*>(tables.pairs[masks[i]]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm_shuffle_epi8(load16(values), pattern));
        values += 2 * _mm_popcnt_u32(masks[i]);
      }
    } else {
      constexpr int64_t most = 16;  // steps whose masks are made at once, so that stores are not read back too soon
      for (int64_t begin = 0; begin < steps; begin += most) {
        const int64_t count = begin + most < steps ? most : steps - begin;
        uint8_t* to = out + begin * kStepBytes;
        const uint8_t* from = masks + begin * mask_bytes(F);
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2 * count; ++i)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), widened<F>(from + mask_bytes(F) / 2 * i));
#pragma GCC unroll 4
        for (int64_t i = 0; i < 2 * count; ++i) {
          int64_t before[5];
          places<F>(from + mask_bytes(F) / 2 * i, before);
          for (int q = 0; q < 4; ++q) {
            uint8_t* eight = to + 32 * i + 8 * q;
            const uint64_t there = _pdep_u64(read<uint64_t>(values + before[q]), read<uint64_t>(eight));
            std::memcpy(eight, &there, 8);
          }
          values += before[4];
        }
      }
    }
    return values;
  }
};

void widen(const void* x, Type type, int64_t n, float* out, int64_t padded) {
  int64_t i = 0;
  switch (type) {
    case Type::f32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      i = n;
      break;
    case Type::bf16: {
      const auto* from = static_cast<const uint8_t*>(x);
      for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, bf16_to_float(from + 2 * i));
      for (; i < n; ++i) out[i] = from_bf16(read<uint16_t>(from + 2 * i));
      break;
    }
    case Type::f16: {
      const auto* from = static_cast<const uint8_t*>(x);
      for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load16(from + 2 * i)));
      for (; i < n; ++i) out[i] = _cvtsh_ss(read<uint16_t>(from + 2 * i));
      break;
    }
  }
  for (; i < padded; ++i) out[i] = 0;
}

void narrow(const float* x, int64_t n, Type type, void* out) {
  int64_t i = 0;
  switch (type) {
    case Type::f32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      break;
    case Type::bf16: {
      auto* to = static_cast<uint16_t*>(out);
      for (; i < n; ++i) to[i] = to_bf16(x[i]);
      break;
    }
    case Type::f16: {
      auto* to = static_cast<uint16_t*>(out);
      for (; i < n; ++i) to[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
      break;
    }
  }
}

void quantise(const float* x, int64_t padded, int8_t* codes, float* scales, int32_t* sums) {
  const __m256i unsigned_bits = _mm256_set1_epi32(0x7fffffff);
  for (int64_t first = 0, g = 0; first < padded; first += kSlice, ++g) {
    constexpr int64_t n = kSlice;
    __m256i most =
        _mm256_setzero_si256();  // as integers, floats without their sign compare the same, and NaN is the largest
    for (int64_t i = 0; i < n; i += 8)
      most = _mm256_max_epu32(_mm256_and_si256(load(x + first + i), unsigned_bits), most);
    uint32_t lanes[8], bits = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
    for (const uint32_t lane : lanes) bits = lane > bits ? lane : bits;
    const Scale scale(bits);
    const __m256 inverse = _mm256_set1_ps(scale.inverse);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 steps = _mm256_mul_ps(_mm256_loadu_ps(x + first + i), inverse);
      const __m256 numbers = _mm256_cmp_ps(steps, steps, _CMP_ORD_Q);  // NaN becomes 0
      const __m256i code = _mm256_cvtps_epi32(_mm256_and_ps(steps, numbers));
      sum = _mm256_add_epi32(sum, code);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + first + i), _mm_packs_epi16(words, words));
    }
    int32_t parts[8], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), sum);
    for (const int32_t part : parts) total += part;
    scales[g] = scale.value;
    sums[g] = total;
  }
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels kernels{"avx2",   multiply<Avx2>, expand<Avx2>, widen,         narrow,
                               quantise, gate,           product,      largest_score, exponentials};
  return kernels;
}

}  // namespace pliant
