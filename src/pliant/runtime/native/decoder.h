// The layers of a Llama-like decoder: norm, attention with rotary positions, norm, gated MLP. Any block may be missing,
// and every layer has sizes of its own.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cache.h"

namespace pliant {

// A tensor's values in place, so that later changes take effect; null if there is none. Filled in by Python.
struct Vector {
  const void* data;
  int64_t type;  // Type
};

// One packed matrix and its optional bias; data is null if there is no such matrix.
struct Projection {
  const uint8_t* data;
  int64_t size;
  Vector bias;
};

struct LayerPlan {
  Projection q, k, v, o, gate, up, down;
  Vector attention_norm, mlp_norm;  // [hidden]
  Vector q_norm, k_norm;            // [head width], or null
  int64_t heads, kv_heads;
  int64_t window;  // tokens that a token sees, 0 for all
  int64_t rotary;  // whether positions are rotated in
};

struct DecoderPlan {
  int64_t hidden, width;  // of the residual stream, of a head
  int64_t activation;     // Activation
  double epsilon;         // of the norms
  double scale;           // of the scores
  Vector final_norm;
};

class Decoder {
 public:
  explicit Decoder(const DecoderPlan& plan) : plan_(plan) {}

  // Adds a layer. Returns its fault, or nothing.
  std::string add(const LayerPlan& plan);

  // stream[tokens][hidden]: embeddings in, the normed hidden state out. cosine and sine are [tokens][rotated].
  // Nanoseconds spent in matrix products and in attention are added to `spent`. Returns false, and changes nothing, if
  // the header of a packed matrix differs from the one at the time its layer was added.
  bool run(float* stream, int64_t tokens, const float* cosine, const float* sine, int64_t rotated, Cache* const* caches,
           int threads, int64_t* spent);

 private:
  struct Layer {
    LayerPlan plan;
    Matrix q, k, v, o, gate, up, down;
    bool attention = false, mlp = false;
    std::vector<std::pair<const uint8_t*, Header>> headers;  // of its packed matrices
  };
  std::mutex running_;
  DecoderPlan plan_;
  std::vector<Layer> layers_;
  PreparedRows rows_;
  std::vector<float> normed_, q_, k_, v_, mixed_, inner_;
  std::vector<float> widened_[3];  // half-precision vectors as floats
};

}  // namespace pliant
