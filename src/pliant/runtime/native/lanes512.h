// The operations on 512 bits in which the AVX-512 kernels are written, twice: as the processor's instructions, and in
// plain C++ to test the same kernels on processors that lack them. Both give the same bits.
//
// `Ints` are 64 bytes, `Floats` 16 floats. A pointer needs no alignment.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define PLIANT_LANES512
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of the undefined registers in its own header
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pliant {
namespace {

#if defined(PLIANT_LANES512)

struct Intrinsics {
  using Ints = __m512i;
  using Floats = __m512;

  static Ints load(const void* p) { return _mm512_loadu_si512(p); }
  static Floats load_floats(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, Ints v) { _mm512_storeu_si512(p, v); }
  static void store(void* p, Floats v) { _mm512_storeu_ps(p, v); }
  // always_inline, because GCC 12 drops calls of a function that only prefetches.
  [[gnu::always_inline]] static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  static Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
  static Floats floats(float x) { return _mm512_set1_ps(x); }
  static Ints four(const void* p) {  // 4 bytes, again and again
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static Ints eight(const void* p) {
    int64_t x;
    std::memcpy(&x, p, 8);
    return _mm512_set1_epi64(x);
  }

  // Puts consecutive elements at the positions in the mask; the others keep the values in `there`. That costs a copy of
  // `there`, which is free on processors. On Zen 5, the form that zeroes the others waits for the old value of the
  // register that it writes. The form that reads memory itself is slow on some processors.
  static Ints expand16(Ints there, uint32_t mask, Ints v) {
    asm("" : "+v"(v));
    return _mm512_mask_expand_epi16(there, mask, v);
  }
  static Ints expand8(Ints there, uint64_t mask, Ints v) { return _mm512_mask_expand_epi8(there, mask, v); }
  static Ints zeros() {  // hides the constant from the compiler, which would use the zeroing form
    Ints v = _mm512_setzero_si512();
    asm("" : "+v"(v));
    return v;
  }

  // 64 nibbles as bytes; the upper half of a byte may hold the nibble that follows.
  static Ints nibbles(const void* p) {
    const Ints at = _mm512_set1_epi64(0x1c1814100c080400);
    return _mm512_multishift_epi64_epi8(at, _mm512_cvtepu32_epi64(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
  }

  static Ints dot(Ints sum, Ints unsigned_bytes, Ints signed_bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
  }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints subtract_bytes(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
  static Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
  static Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
  static Ints both_xor(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi32(a, b, c, 0x6a); }  // a & b ^ c
  static Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
  static Ints largest(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
  static Ints left16(Ints v) { return _mm512_slli_epi32(v, 16); }  // of 32 bits
  static Ints right4(Ints v) { return _mm512_srli_epi16(v, 4); }   // of 16 bits
  static uint32_t most(Ints v) { return _mm512_reduce_max_epu32(v); }
  static int32_t total(Ints v) { return _mm512_reduce_add_epi32(v); }

  static Ints shuffle(Ints v, Ints from) { return _mm512_shuffle_epi8(v, from); }  // of every 16 bytes
  // Every second element, of a and then of b.
  static Ints evens(Ints a, Ints b) { return _mm512_permutex2var_epi32(a, every_second<int32_t, 0>(), b); }
  static Ints odds(Ints a, Ints b) { return _mm512_permutex2var_epi32(a, every_second<int32_t, 1>(), b); }
  static Ints even_bytes(Ints a, Ints b) { return _mm512_permutex2var_epi8(a, every_second<uint8_t, 0>(), b); }
  static Ints odd_bytes(Ints a, Ints b) { return _mm512_permutex2var_epi8(a, every_second<uint8_t, 1>(), b); }

  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
  static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Ints to_ints(Floats v) {  // the nearest; 0 of NaN
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  }
  static void store_bytes(void* p, Ints v) {  // 16 that fit
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
  }

  static Floats load_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(p)), 16));
  }
  static Floats load_f16(const void* p) { return _mm512_cvtph_ps(half(p)); }
  static void store_bf16(void* p, Floats v) {
    const Ints bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const Ints last = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const Ints near = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const Ints nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const Ints out = _mm512_mask_mov_epi32(_mm512_srli_epi32(near, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
  }
  static void store_f16(void* p, Floats v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_flushed_bf16(void* p, Floats v) {  // the instruction for it: numbers below 2^-126 become zero
    const __m256bh out = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &out, sizeof out);
  }

 private:
  static __m256i half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  template <class T>
  struct Places {
    alignas(64) T from[64 / sizeof(T)];
    constexpr explicit Places(int first) : from() {
      for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) from[i] = static_cast<T>(2 * i + first);
    }
  };
  template <class T, int first>
  static Ints every_second() {
    static constexpr Places<T> places{first};
    return _mm512_load_si512(places.from);
  }
};

#endif

struct Emulated {
  struct Ints {
    uint8_t bytes[64];
  };
  struct Floats {
    float lanes[16];
  };

  static Ints load(const void* p) { return copy<Ints>(p); }
  static Floats load_floats(const void* p) { return copy<Floats>(p); }
  static void store(void* p, const Ints& v) { std::memcpy(p, &v, sizeof v); }
  static void store(void* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
  static void prefetch(const uint8_t*) {}

  static Ints ints(int32_t x) {
    return each<int32_t>([&](int) { return x; });
  }
  static Floats floats(float x) {
    return each_float([&](int) { return x; });
  }
  static Ints four(const void* p) { return ints(copy<int32_t>(p)); }
  static Ints eight(const void* p) {
    return each<uint64_t>([&](int) { return copy<uint64_t>(p); });
  }

  static Ints expand16(const Ints& there, uint32_t mask, const Ints& v) { return expand<uint16_t>(there, mask, v); }
  static Ints expand8(const Ints& there, uint64_t mask, const Ints& v) { return expand<uint8_t>(there, mask, v); }
  static Ints zeros() { return ints(0); }

  static Ints nibbles(const void* p) {
    return each<uint8_t>(
        [&](int i) { return copy<uint32_t>(static_cast<const uint8_t*>(p) + i / 8 * 4) >> i % 8 * 4; });
  }

  static Ints dot(const Ints& sum, const Ints& unsigned_bytes, const Ints& signed_bytes) {
    return each<uint32_t>([&](int i) {
      int32_t products = 0;
      for (int k = 4 * i; k < 4 * i + 4; ++k)
        products += unsigned_bytes.bytes[k] * static_cast<int8_t>(signed_bytes.bytes[k]);
      return at<uint32_t>(sum, i) + static_cast<uint32_t>(products);
    });
  }
  static Ints add(const Ints& a, const Ints& b) {
    return each<uint32_t>([&](int i) { return at<uint32_t>(a, i) + at<uint32_t>(b, i); });
  }
  static Ints subtract_bytes(const Ints& a, const Ints& b) {
    return each<uint8_t>([&](int i) { return a.bytes[i] - b.bytes[i]; });
  }
  static Ints exclusive_or(const Ints& a, const Ints& b) {
    return each<uint8_t>([&](int i) { return a.bytes[i] ^ b.bytes[i]; });
  }
  static Ints both(const Ints& a, const Ints& b) {
    return each<uint8_t>([&](int i) { return a.bytes[i] & b.bytes[i]; });
  }
  static Ints both_xor(const Ints& a, const Ints& b, const Ints& c) { return exclusive_or(both(a, b), c); }
  static Ints either(const Ints& a, const Ints& b) {
    return each<uint8_t>([&](int i) { return a.bytes[i] | b.bytes[i]; });
  }
  static Ints largest(const Ints& a, const Ints& b) {
    return each<uint32_t>([&](int i) {
      const auto one = at<uint32_t>(a, i), other = at<uint32_t>(b, i);
      return one > other ? one : other;
    });
  }
  static Ints left16(const Ints& v) {
    return each<uint32_t>([&](int i) { return at<uint32_t>(v, i) << 16; });
  }
  static Ints right4(const Ints& v) {
    return each<uint16_t>([&](int i) { return at<uint16_t>(v, i) >> 4; });
  }
  static uint32_t most(const Ints& v) {
    uint32_t out = 0;
    for (int i = 0; i < 16; ++i) out = at<uint32_t>(v, i) > out ? at<uint32_t>(v, i) : out;
    return out;
  }
  static int32_t total(const Ints& v) {
    uint32_t out = 0;
    for (int i = 0; i < 16; ++i) out += at<uint32_t>(v, i);
    return static_cast<int32_t>(out);
  }

  static Ints shuffle(const Ints& v, const Ints& from) {
    return each<uint8_t>([&](int i) { return from.bytes[i] & 0x80 ? 0 : v.bytes[(i & 48) + (from.bytes[i] & 15)]; });
  }
  static Ints evens(const Ints& a, const Ints& b) { return every_second<uint32_t>(a, b, 0); }
  static Ints odds(const Ints& a, const Ints& b) { return every_second<uint32_t>(a, b, 1); }
  static Ints even_bytes(const Ints& a, const Ints& b) { return every_second<uint8_t>(a, b, 0); }
  static Ints odd_bytes(const Ints& a, const Ints& b) { return every_second<uint8_t>(a, b, 1); }

  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each_float([&](int i) { return __builtin_fmaf(a.lanes[i], b.lanes[i], c.lanes[i]); });
  }
  static Floats add(const Floats& a, const Floats& b) {
    return each_float([&](int i) { return a.lanes[i] + b.lanes[i]; });
  }
  static Floats multiply(const Floats& a, const Floats& b) {
    return each_float([&](int i) { return a.lanes[i] * b.lanes[i]; });
  }
  static Floats as_floats(const Ints& v) { return copy<Floats>(&v); }
  static Floats to_floats(const Ints& v) {
    return each_float([&](int i) { return static_cast<float>(at<int32_t>(v, i)); });
  }
  static Ints to_ints(const Floats& v) {
    return each<int32_t>([&](int i) {
      const float x = __builtin_nearbyintf(v.lanes[i]);
      if (x != x) return 0;
      return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
    });
  }
  static void store_bytes(void* p, const Ints& v) {
    int8_t out[16];
    for (int i = 0; i < 16; ++i) {
      const auto x = at<int32_t>(v, i);
      out[i] = static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
    }
    std::memcpy(p, out, sizeof out);
  }

  static Floats load_bf16(const void* p) {
    return each_float([&](int i) { return from_bf16(copy<uint16_t>(static_cast<const uint8_t*>(p) + 2 * i)); });
  }
  static Floats load_f16(const void* p) {
    return each_float([&](int i) {
      const uint32_t half = copy<uint16_t>(static_cast<const uint8_t*>(p) + 2 * i);
      const uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
      if (exponent == 31) return number(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
      if (exponent == 0) return number(sign | bits(static_cast<float>(fraction) * 0x1p-24f));
      return number(sign | (exponent + 112) << 23 | fraction << 13);
    });
  }
  static void store_bf16(void* p, const Floats& v) {
    for (int i = 0; i < 16; ++i) put(p, i, to_bf16(v.lanes[i]));
  }
  static void store_f16(void* p, const Floats& v) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t all = bits(v.lanes[i]), sign = all >> 16 & 0x8000, size = all & 0x7fffffff;
      if (size > 0x7f800000) {
        put(p, i, sign | 0x7e00 | (size >> 13 & 0x3ff));
      } else if (size >= bits(65520.0f)) {
        put(p, i, sign | 0x7c00);
      } else if (size >= bits(0x1p-14f)) {
        put(p, i, sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13);
      } else {  // a float of one half and more has its last bit where the half-precision number has it
        put(p, i, sign | (bits(number(size) + 0.5f) - bits(0.5f)));
      }
    }
  }
  static void store_flushed_bf16(void* p, const Floats& v) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t all = bits(v.lanes[i]);
      put(p, i, all & 0x7f800000 ? to_bf16(v.lanes[i]) : all >> 16 & 0x8000);
    }
  }

 private:
  template <class T>
  static T copy(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static uint32_t bits(float x) { return copy<uint32_t>(&x); }
  static float number(uint32_t bits) { return copy<float>(&bits); }
  static void put(void* p, int i, uint32_t x) {
    const auto out = static_cast<uint16_t>(x);
    std::memcpy(static_cast<uint8_t*>(p) + 2 * i, &out, 2);
  }
  template <class T>
  static T at(const Ints& v, int i) {
    return copy<T>(v.bytes + static_cast<size_t>(i) * sizeof(T));
  }
  template <class T, class F>
  static Ints each(F f) {
    T out[64 / sizeof(T)];
    for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) out[i] = static_cast<T>(f(i));
    return copy<Ints>(out);
  }
  template <class F>
  static Floats each_float(F f) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.lanes[i] = f(i);
    return out;
  }
  template <class T>
  static Ints expand(const Ints& there, uint64_t mask, const Ints& v) {
    int from = 0;
    return each<T>([&](int i) { return mask >> i & 1 ? at<T>(v, from++) : at<T>(there, i); });
  }
  template <class T>
  static Ints every_second(const Ints& a, const Ints& b, int first) {
    constexpr int n = 32 / sizeof(T);
    return each<T>([&](int i) { return i < n ? at<T>(a, 2 * i + first) : at<T>(b, 2 * (i - n) + first); });
  }
};

}  // namespace
}  // namespace pliant
