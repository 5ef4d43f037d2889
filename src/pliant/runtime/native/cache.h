// Keys and values of the tokens so far, in blocks of 64.
#pragma once

#include <vector>

#include "linear.h"
#include "pack.h"

namespace pliant {

constexpr int64_t kMostSharing = 32;  // query heads that share a key-value head
constexpr int64_t kWidest = 256;      // elements of a head

// The format of older tokens.
struct Keeping {
  int32_t packed = 0;  // 0: floats, as they came; 1: blocks that are full and old enough are packed
  int32_t format = 0;  // of packed blocks: Format
  float key_sparsity = 0, value_sparsity = 0;  // share of the smallest that is zeroed in a packed block
  int64_t recent = 0;                          // tokens at the end that stay floats
  int64_t first = 0;                           // tokens at the beginning of which nothing is zeroed
};

// Of one layer. Heads are key-value heads: query heads that share one are rows that are multiplied together.
class Cache {
 public:
  Cache(int64_t heads, int64_t width, const Keeping& keeping) : heads_(heads), width_(width), keeping_(keeping) {}
  Cache(const Cache& other);  // deep copy
  Cache& operator=(const Cache&) = delete;

  int64_t length() const { return length_; }
  int64_t bytes() const;

  // [tokens][heads * width] each, `stride` floats from one token to the next.
  void append(const float* keys, const float* values, int64_t tokens, int64_t stride);

  // Packs the blocks that are old enough. This is not part of append, so that a prompt attends to its exact values.
  void settle(int threads);

  // Drops all but the first `length` tokens. A packed block is unpacked again if it is cut.
  void crop(int64_t length);

  // [heads][length][width] each
  void read(float* keys, float* values) const;

  // out[token][head * width] of the last `tokens` tokens. Each attends to the tokens before it and to itself; with a
  // window, to the last `window` of these. q and out have `query_heads` heads per token.
  void attend(const float* q, int64_t tokens, int64_t query_heads, float scale, int64_t window, float* out,
              int threads) const;

 private:
  struct Block {
    std::vector<float> keys, values;                  // [width][64] and [64][width], or empty when packed
    std::vector<uint8_t> packed_keys, packed_values;  // matrices of 64 x width and width x 64
    Matrix key_matrix, value_matrix;                  // views of packed_keys and packed_values

    void look();  // sets the views; call it when the packed bytes are new or have moved
  };
  struct Partial;

  void open_block(int64_t head);
  void pack_block(Block& block, int64_t begin) const;
  void unpack_block(Block& block) const;
  void attend_span(const float* q, int64_t rows, int64_t per_token, int64_t first_position, int64_t head, int64_t span,
                   int64_t window, Partial* partials) const;

  int64_t heads_, width_, length_ = 0, settled_ = 0;  // settled: blocks that are packed
  Keeping keeping_;
  std::vector<std::vector<Block>> blocks_{static_cast<size_t>(heads_)};  // [heads][blocks]
};

}  // namespace pliant
