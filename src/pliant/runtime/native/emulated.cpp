// The kernels for AVX-512 and AMX in plain C++: slow, for tests on processors that have neither.
#include "amx.h"

namespace pliant {

const Kernels& emulated_avx512_kernels() {
  static const Kernels kernels = kernels_of<Emulated>("avx512-emulated");
  return kernels;
}

const Kernels& emulated_amx_kernels() {
  static const Kernels kernels = amx_kernels_of<Emulated, Software>("amx-emulated");
  return kernels;
}

}  // namespace pliant
