// The functions of every instruction set. Each is a translation unit, compiled with its own flags.
#pragma once

#include "attention.h"
#include "format.h"

namespace pliant {

constexpr int64_t kTogether = 2;  // panels that are multiplied at once: two streams draw more from memory than one does

enum class Type : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct Kernels {
  const char* name;

  // out[r][c] = x W^T, all rows of x, the columns of `count` panels from `panel` on; rows of `out` are `stride` floats
  // apart. `scratch` has room for one panel without gaps.
  void (*multiply)(const Matrix& w, int64_t panel, int64_t count, const Input& x, float* out, int64_t stride,
                   uint8_t* scratch);

  // The dense stream of a panel of a sparse matrix.
  void (*expand)(const Matrix& w, int64_t panel, uint8_t* out);

  // One row: n values of any type as floats, padded with zeros to `padded`.
  void (*widen)(const void* x, Type type, int64_t n, float* out, int64_t padded);
  void (*narrow)(const float* x, int64_t n, Type type, void* out);

  // One row of floats as codes, scales and sums of its slices; padded is a multiple of kSlice.
  void (*quantise)(const float* x, int64_t padded, int8_t* codes, float* scales, int32_t* sums);

  // out = activation(gate) * up, n of each
  void (*gate)(const float* gate, const float* up, int64_t n, Activation kind, float* out);

  // The parts of attention: see attention.h.
  void (*product)(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t n,
                  int64_t columns, float* out, int64_t out_stride, bool add);
  float (*largest)(const float* scores, int64_t n);
  float (*exponentials)(float* scores, int64_t n, float most);
};

namespace {

// The scale of a slice's codes, from the bits of its largest absolute value. If that is not finite, every output is
// NaN; if it is too small to divide by, the slice counts as zero.
struct Scale {
  float value, inverse;
  explicit Scale(uint32_t bits) {
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000;
    value = finite ? largest / 127 : __builtin_nanf("");
    inverse = finite && largest > 1e-30f ? 127 / largest : 0;
  }
};

}  // namespace

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
const Kernels& emulated_avx512_kernels();
const Kernels& emulated_amx_kernels();

}  // namespace pliant
