// Memory that is kept from call to call.
#pragma once

#include <cstdint>
#include <vector>

namespace pliant {

// Makes a buffer hold at least `size` elements; it never shrinks.
template <class T>
T* room(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

}  // namespace pliant
