// Chooses the kernels for this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pliant {

// Names of all instruction sets that can be chosen here, the best first; emulated ones, which are slow, are last.
const std::vector<const Kernels*>& available();

// The kernels in use: the best for this processor, or those of the last `choose`.
const Kernels& kernels();

// False if this processor does not have the set.
bool choose(const std::string& name);

}  // namespace pliant
