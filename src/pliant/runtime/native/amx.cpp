#include "amx.h"

namespace pliant {

const Kernels& amx_kernels() {
  static const Kernels kernels = amx_kernels_of<Intrinsics, Hardware>("amx");
  return kernels;
}

}  // namespace pliant
