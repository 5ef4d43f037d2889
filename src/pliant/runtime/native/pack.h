// Dense weights to the packed form and back.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "format.h"

namespace pliant {

// A matrix before its packed form is written: codes and scales are chosen, nothing is laid out yet.
class Packing {
 public:
  // `weight` is [rows][columns]. `scales` are those of the codes: float[rows] for int8, float[rows][groups] with bf16
  // numbers for int4; if null, they are chosen here. Only int4 uses `group`.
  Packing(const float* weight, int64_t rows, int64_t columns, Format format, bool sparse, int64_t group,
          const float* scales, int threads);

  int64_t size() const { return header_.size; }
  void write(uint8_t* out, int threads) const;

 private:
  void stream(int64_t panel, int64_t first, int64_t count, uint8_t* out) const;  // `count` steps of 64 bytes each

  Header header_{};
  int64_t panels_, steps_, group_, groups_;
  std::unique_ptr<uint16_t[]> bf16_;  // weights, or scales of int4
  std::unique_ptr<int8_t[]> codes_;   // [rows][columns]
  std::unique_ptr<float[]> scales_;   // [rows] of int8
  std::vector<int64_t> offsets_;
};

// Opens a packed matrix without reading its values; `full` also counts masks and compares the checksum. Returns its
// fault, or nothing.
std::string open(const uint8_t* data, int64_t size, bool full, int threads, Matrix* out);

// All weights as floats, [rows][columns].
void unpack(const Matrix& w, float* out, int threads);

}  // namespace pliant
