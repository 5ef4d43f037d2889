// y = x W^T + b, for one matrix or several that read the same x.
#pragma once

#include <vector>

#include "kernels.h"

namespace pliant {

// Prepared rows of x: floats, and codes if a matrix needs them.
class PreparedRows {
 public:
  // `stride` is in elements.
  void read(const void* x, Type type, int64_t rows, int64_t columns, int64_t stride, bool codes, int threads);
  const Input& input() const { return input_; }

 private:
  Input input_{};
  std::vector<float> values_, scales_;
  std::vector<int8_t> codes_;
  std::vector<int32_t> sums_;
};

// One result. With a second matrix, y = activation(x W^T + b) * (x U^T + c).
struct Task {
  const Matrix* weight;
  const float* bias = nullptr;
  const Matrix* up = nullptr;  // of the same rows as `weight`
  const float* up_bias = nullptr;
  Activation activation = Activation::none;
  void* out = nullptr;
  Type type = Type::f32;
  int64_t stride = 0;       // elements from one row of y to the next
  bool accumulate = false;  // fp32 only: y += instead of y =
};

void linear(const Task* tasks, int count, const Input& x, int threads);

}  // namespace pliant
