#include "avx512.h"

namespace pliant {

const Kernels& avx512_kernels() {
  static const Kernels kernels = kernels_of<Intrinsics>("avx512");
  return kernels;
}

}  // namespace pliant
