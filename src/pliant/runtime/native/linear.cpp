#include "linear.h"

#include <algorithm>

#include "buffer.h"
#include "cpu.h"
#include "pool.h"

namespace pliant {
namespace {

constexpr int64_t kPad = 64;            // x is padded to a multiple of it, with zeros after the last column
constexpr int64_t kRowsTogether = 32;   // rows multiplied with a panel while it is in the cache
constexpr int64_t kChunkBytes = 32768;  // of weights that a thread claims at once

int64_t panel_bytes(const Matrix& w) { return w.steps * kStepBytes; }

void panels(const Task& task, int64_t panel, int64_t count, const Input& x, const Kernels& k) {
  thread_local std::vector<uint8_t> scratch;
  alignas(64) float first[kRowsTogether * kTogether * kPanel];
  alignas(64) float second[kRowsTogether * kTogether * kPanel];
  constexpr int64_t stride = kTogether * kPanel;
  const Matrix& w = *task.weight;
  int64_t most = panel_bytes(w);
  if (task.up) most = std::max(most, panel_bytes(*task.up));
  room(scratch, most);
  const int64_t begin = panel * kPanel;
  const int64_t columns = std::min(count * kPanel, w.rows - begin);
  const int64_t size = task.type == Type::f32 ? 4 : 2;
  for (int64_t row = 0; row < x.rows; row += kRowsTogether) {
    Input some = x;
    some.rows = std::min(kRowsTogether, x.rows - row);
    some.values += row * x.stride;
    some.codes += row * x.stride;
    some.scales += row * x.slices;
    some.sums += row * x.slices;
    k.multiply(w, panel, count, some, first, stride, scratch.data());
    if (task.up) k.multiply(*task.up, panel, count, some, second, stride, scratch.data());
    for (int64_t r = 0; r < some.rows; ++r) {
      float* y = first + r * stride;
      if (task.bias) {
        for (int64_t c = 0; c < columns; ++c) y[c] += task.bias[begin + c];
      }
      if (task.up) {
        float* u = second + r * stride;
        if (task.up_bias) {
          for (int64_t c = 0; c < columns; ++c) u[c] += task.up_bias[begin + c];
        }
        k.gate(y, u, columns, task.activation, y);
      }
      char* to = static_cast<char*>(task.out) + ((row + r) * task.stride + begin) * size;
      if (task.accumulate) {
        auto* sum = reinterpret_cast<float*>(to);
        for (int64_t c = 0; c < columns; ++c) sum[c] += y[c];
      } else {
        k.narrow(y, columns, task.type, to);
      }
    }
  }
}

}  // namespace

void PreparedRows::read(const void* x, Type type, int64_t rows, int64_t columns, int64_t stride, bool codes,
                        int threads) {
  const int64_t padded = ceil_div(columns, kPad) * kPad;
  const int64_t slices = padded / kSlice;
  float* values = room(values_, rows * padded);
  float* scales = room(scales_, rows * slices);
  int32_t* sums = room(sums_, rows * slices);
  int8_t* to = room(codes_, rows * padded);
  const Kernels& k = kernels();
  const int64_t size = type == Type::f32 ? 4 : 2;
  const int64_t chunk = std::max<int64_t>(1, 16384 / padded);
  parallel(threads, ceil_div(rows, chunk), [&](int64_t at) {
    for (int64_t r = at * chunk; r < std::min(rows, (at + 1) * chunk); ++r) {
      float* row = values + r * padded;
      k.widen(static_cast<const char*>(x) + r * stride * size, type, columns, row, padded);
      if (codes) k.quantise(row, padded, to + r * padded, scales + r * slices, sums + r * slices);
    }
  });
  input_ = {rows, padded, values, to, scales, sums, slices};
}

void linear(const Task* tasks, int count, const Input& x, int threads) {
  const Kernels& k = kernels();
  std::vector<int64_t> begins(static_cast<size_t>(count) + 1);  // of each task's chunks
  std::vector<int64_t> sizes(static_cast<size_t>(count));       // panels in a chunk of each
  for (int t = 0; t < count; ++t) {
    const Matrix& w = *tasks[t].weight;
    sizes[t] = kTogether * std::max<int64_t>(1, kChunkBytes / (kTogether * panel_bytes(w)));
    begins[t + 1] = begins[t] + ceil_div(w.panels, sizes[t]);
  }
  parallel(threads, begins[count], [&](int64_t chunk) {
    const auto t = std::upper_bound(begins.begin(), begins.end(), chunk) - begins.begin() - 1;
    const Matrix& w = *tasks[t].weight;
    const int64_t first = (chunk - begins[t]) * sizes[t];
    for (int64_t p = first; p < std::min(w.panels, first + sizes[t]); p += kTogether) {
      panels(tasks[t], p, std::min(kTogether, w.panels - p), x, k);
    }
  });
}

}  // namespace pliant
