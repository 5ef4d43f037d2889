// The packed form of one weight matrix, as it lies in memory and on disk.
//
// W has `rows` outputs and `columns` inputs, y = x W^T. Sixteen outputs make a panel. Within a panel the weights lie
// step after step along the inputs, in the order in which dot-product instructions read them:
//
//   bf16   a step is 2 inputs, 64 bytes:  element 2c + k  is weight (output c, input k)
//   int8   a step is 4 inputs, 64 bytes:  byte    4c + k  is code (c, k)
//   int4   a step is 8 inputs, 64 bytes:  byte    4c + k  is code (c, k) in its low nibble, (c, 4 + k) in its high one
//
// Codes are two's complement. The sparse forms leave zeros out of that stream: a bit for every element, lowest first,
// says which are stored, and the values follow each other without gaps. int4 keeps an even number of every 16 nibbles,
// by storing a zero if needed, so that each 16 begin at a byte.
//
// int4 has a bf16 scale per output and group of 32, 64 or 128 inputs, int8 a float per output. Nothing in the form
// depends on the number of threads or on the processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pliant {

enum class Format : uint32_t { bf16 = 0, int8 = 1, int4 = 2 };

constexpr int64_t kPanel = 16;
constexpr int64_t kChunk = 128;  // inputs that a kernel reads at once: whole groups and slices
constexpr int64_t kSlice = 32;   // inputs of x that share a scale: fewer than of W, as x has single large values
constexpr int64_t kStepBytes = 64;
constexpr uint32_t kVersion = 1;
constexpr char kMagic[8] = {'P', 'L', 'I', 'A', 'N', 'T', 'W', '\n'};
// readable bytes after the values, because a whole vector is loaded even for one element
constexpr int64_t kSlack = 64;

// The first 128 bytes. Positions are bytes from the beginning; everything is little-endian.
struct Header {
  char magic[8];
  uint32_t version;
  uint32_t format;
  uint32_t sparse;
  uint32_t group;  // inputs that share a scale, in int4; 0 in other formats
  int64_t rows;
  int64_t columns;
  int64_t stored;  // number of stored elements: in a dense form all rows * columns
  int64_t scales;
  int64_t offsets;  // sparse: where in the values each panel begins, one more for the end
  int64_t masks;
  int64_t values;
  int64_t size;       // of everything
  uint64_t checksum;  // of all words of 8 bytes, this one as 0
  uint8_t unused[32];
};
static_assert(sizeof(Header) == 128);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t step_inputs(Format f) { return f == Format::bf16 ? 2 : f == Format::int8 ? 4 : 8; }

// Bytes of mask that belong to the 64 bytes of a step.
constexpr int64_t mask_bytes(Format f) { return f == Format::bf16 ? 4 : f == Format::int8 ? 8 : 16; }

// Bytes of the scales of all panels; int4 has `groups` of them per output.
constexpr int64_t scale_bytes(Format f, int64_t panels, int64_t groups) {
  return f == Format::bf16 ? 0 : panels * kPanel * (f == Format::int8 ? 4 : 2 * groups);
}

// A view of a packed matrix: pointers into the memory that holds it. None needs an alignment.
struct Matrix {
  Format format;
  bool sparse;
  int64_t rows, columns;
  int64_t panels, steps, chunks;  // steps and chunks of one panel
  int64_t group, groups;          // int4: inputs that share a scale, and how many scales an output has
  const uint8_t* scales;          // float[panels][16] or bf16[panels][groups][16]
  const uint8_t* offsets;         // int64[panels + 1]
  const uint8_t* masks;           // [panels][steps][mask_bytes]
  const uint8_t* values;          // dense: [panels][steps][64]
  int64_t following = 0;  // bytes from `values` to those of a dense matrix that is read next; 0 where none is known

  const uint8_t* panel_values(int64_t p) const {
    if (!sparse) return values + p * steps * kStepBytes;
    int64_t at;
    __builtin_memcpy(&at, offsets + 8 * p, 8);
    return values + at;
  }
  const uint8_t* panel_masks(int64_t p) const { return masks + p * steps * mask_bytes(format); }
};

// The rows of x that the kernels read. Values are fp32; int8 and int4 read codes: x = code * scale, a scale per slice.
struct Input {
  int64_t rows;
  int64_t stride;       // elements from one row to the next, of values and of codes
  const float* values;  // [rows][stride], zeros after the last column
  const int8_t* codes;  // [rows][stride], zeros after the last column
  const float* scales;  // [rows][slices]
  const int32_t* sums;  // [rows][slices], of the codes
  int64_t slices;
};

}  // namespace pliant
