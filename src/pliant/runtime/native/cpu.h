// Which kernels this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pliant {

// Names of all instruction sets that can be chosen here, the best first; emulated ones, which are slow, are last.
const std::vector<const Kernels*>& available();

// The kernels in use: the best there are, or what `choose` says.
const Kernels& kernels();

// False where there is no such set here.
bool choose(const std::string& name);

}  // namespace pliant
