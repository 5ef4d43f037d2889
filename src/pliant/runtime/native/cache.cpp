#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.h"
#include "pool.h"

namespace pliant {
namespace {

constexpr int64_t kSpan = 256;  // tokens that are summed up together: the same sums with any number of threads
constexpr int64_t kRowsAtOnce = kMostSharing;  // query rows of a unit of work

// Zeroes the `share` smallest of n values with a stride, ties in order.
void prune(float* values, int64_t n, float share) {
  const auto count = static_cast<int64_t>(std::llround(share * static_cast<float>(n)));
  if (count < 1) return;
  std::vector<float> sizes(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) sizes[static_cast<size_t>(i)] = std::fabs(values[i]);
  std::nth_element(sizes.begin(), sizes.begin() + (count - 1), sizes.end());
  const float border = sizes[static_cast<size_t>(count - 1)];
  int64_t left = count;
  for (int64_t i = 0; i < n; ++i) left -= std::fabs(values[i]) < border;
  for (int64_t i = 0; i < n; ++i) {
    const float size = std::fabs(values[i]);
    if (size < border || (size == border && left-- > 0)) values[i] = 0;
  }
}

}  // namespace

// The sums of rows over some tokens: the largest score, the sum of e^(score - largest), and the values weighted by
// these terms.
struct Cache::Partial {
  float most, sum;
  alignas(64) float mixed[kWidest];
};

Cache::Cache(const Cache& other)
    : heads_(other.heads_),
      width_(other.width_),
      length_(other.length_),
      settled_(other.settled_),
      keeping_(other.keeping_),
      blocks_(other.blocks_) {
  for (auto& of_head : blocks_)
    for (Block& block : of_head) block.look();
}

void Cache::Block::look() {
  if (packed_keys.empty()) return;
  open(packed_keys.data(), static_cast<int64_t>(packed_keys.size()), false, 1, &key_matrix);
  open(packed_values.data(), static_cast<int64_t>(packed_values.size()), false, 1, &value_matrix);
}

void Cache::open_block(int64_t head) {
  Block block;
  block.keys.resize(static_cast<size_t>(width_ * kBlock));
  block.values.resize(static_cast<size_t>(width_ * kBlock));
  blocks_[static_cast<size_t>(head)].push_back(std::move(block));
}

void Cache::append(const float* keys, const float* values, int64_t tokens, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t place = (length_ + t) % kBlock;
    for (int64_t h = 0; h < heads_; ++h) {
      auto& blocks = blocks_[static_cast<size_t>(h)];
      if (place == 0) open_block(h);
      Block& block = blocks.back();
      const float* k = keys + t * stride + h * width_;
      for (int64_t d = 0; d < width_; ++d) block.keys[static_cast<size_t>(d * kBlock + place)] = k[d];
      std::memcpy(block.values.data() + place * width_, values + t * stride + h * width_,
                  static_cast<size_t>(width_) * 4);
    }
  }
  length_ += tokens;
}

void Cache::pack_block(Block& block, int64_t begin) const {
  // nothing of the first tokens is zeroed: only the rows after them are pruned
  const int64_t whole = std::clamp<int64_t>(keeping_.first - begin, 0, kBlock);
  std::vector<float> keys(block.keys.size()), values(block.values.size());
  for (int64_t t = 0; t < kBlock; ++t)
    for (int64_t d = 0; d < width_; ++d)
      keys[static_cast<size_t>(t * width_ + d)] = block.keys[static_cast<size_t>(d * kBlock + t)];
  prune(keys.data() + whole * width_, (kBlock - whole) * width_, keeping_.key_sparsity);
  std::vector<float> rows = block.values;
  prune(rows.data() + whole * width_, (kBlock - whole) * width_, keeping_.value_sparsity);
  for (int64_t t = 0; t < kBlock; ++t)
    for (int64_t d = 0; d < width_; ++d)
      values[static_cast<size_t>(d * kBlock + t)] = rows[static_cast<size_t>(t * width_ + d)];
  const auto format = static_cast<Format>(keeping_.format);
  const Packing k(keys.data(), kBlock, width_, format, keeping_.key_sparsity > 0, 0, nullptr, 1);
  const Packing v(values.data(), width_, kBlock, format, keeping_.value_sparsity > 0, 0, nullptr, 1);
  block.packed_keys.resize(static_cast<size_t>(k.size()));
  block.packed_values.resize(static_cast<size_t>(v.size()));
  k.write(block.packed_keys.data(), 1);
  v.write(block.packed_values.data(), 1);
  block.look();
  block.keys = {};
  block.values = {};
}

void Cache::unpack_block(Block& block) const {
  std::vector<float> keys(static_cast<size_t>(kBlock * width_)), values(keys.size());
  unpack(block.key_matrix, keys.data(), 1);
  unpack(block.value_matrix, values.data(), 1);
  block.keys.resize(keys.size());
  block.values.resize(keys.size());
  for (int64_t t = 0; t < kBlock; ++t) {
    for (int64_t d = 0; d < width_; ++d) {
      block.keys[static_cast<size_t>(d * kBlock + t)] = keys[static_cast<size_t>(t * width_ + d)];
      block.values[static_cast<size_t>(t * width_ + d)] = values[static_cast<size_t>(d * kBlock + t)];
    }
  }
  block.packed_keys = {};
  block.packed_values = {};
}

void Cache::settle(int threads) {
  if (!keeping_.packed) return;
  const int64_t full = std::max<int64_t>(0, length_ - keeping_.recent) / kBlock;
  if (full <= settled_) return;
  const int64_t fresh = full - settled_;
  parallel(threads, heads_ * fresh, [&](int64_t i) {
    const int64_t b = settled_ + i % fresh;
    pack_block(blocks_[static_cast<size_t>(i / fresh)][static_cast<size_t>(b)], b * kBlock);
  });
  settled_ = full;
}

void Cache::crop(int64_t length) {
  if (length >= length_) return;
  const int64_t blocks = ceil_div(length, kBlock);
  for (auto& of_head : blocks_) {
    of_head.resize(static_cast<size_t>(blocks));
    if (length % kBlock && !of_head.back().packed_keys.empty()) unpack_block(of_head.back());
  }
  settled_ = std::min(settled_, length / kBlock);
  length_ = length;
}

void Cache::read(float* keys, float* values) const {
  for (int64_t h = 0; h < heads_; ++h) {
    for (int64_t b = 0; b * kBlock < length_; ++b) {
      Block block = blocks_[static_cast<size_t>(h)][static_cast<size_t>(b)];
      if (!block.packed_keys.empty()) {
        block.look();
        unpack_block(block);
      }
      for (int64_t t = 0; t < std::min(kBlock, length_ - b * kBlock); ++t) {
        float* k = keys + (h * length_ + b * kBlock + t) * width_;
        for (int64_t d = 0; d < width_; ++d) k[d] = block.keys[static_cast<size_t>(d * kBlock + t)];
        std::memcpy(values + (h * length_ + b * kBlock + t) * width_, block.values.data() + t * width_,
                    static_cast<size_t>(width_) * 4);
      }
    }
  }
}

int64_t Cache::bytes() const {
  size_t sum = 0;
  for (const auto& of_head : blocks_) {
    for (const Block& b : of_head)
      sum += (b.keys.size() + b.values.size()) * 4 + b.packed_keys.size() + b.packed_values.size();
  }
  return static_cast<int64_t>(sum);
}

// Rows are query heads of one key-value head, `per_token` per token; row r is at position first_position + r /
// per_token.
void Cache::attend_span(const float* q, int64_t rows, int64_t per_token, int64_t first_position, int64_t head,
                        int64_t span, int64_t window, Partial* partials) const {
  const Kernels& k = kernels();
  thread_local PreparedRows of_q, of_p;
  thread_local std::vector<uint8_t> scratch(kBlock * kWidest * 2);
  thread_local std::vector<float> scores(kRowsAtOnce * kSpan), mixed(kRowsAtOnce * kWidest);
  const int64_t begin = span * kSpan;
  const int64_t end = std::min(begin + kSpan, first_position + (rows - 1) / per_token + 1);
  const int64_t blocks = ceil_div(end - begin, kBlock);
  const int64_t packed = std::clamp<int64_t>(settled_ - begin / kBlock, 0, blocks);  // the first ones
  const bool codes = static_cast<Format>(keeping_.format) != Format::bf16;
  const Block* block = blocks_[static_cast<size_t>(head)].data() + begin / kBlock;
  if (packed > 0) of_q.read(q, Type::f32, rows, width_, width_, codes, 1);
  for (int64_t b = 0; b < blocks; ++b) {
    float* s = scores.data() + b * kBlock;
    if (b < packed) {
      Matrix keys = block[b].key_matrix;
      keys.following = (b + 1 < packed ? block[b + 1].key_matrix : block->value_matrix).values - keys.values;
      k.multiply(keys, 0, keys.panels, of_q.input(), s, kSpan, scratch.data());
    } else {
      k.product(q, width_, rows, block[b].keys.data(), kBlock, width_, kBlock, s, kSpan, false);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = first_position + r / per_token;
    const int64_t from = window > 0 ? std::clamp<int64_t>(position - window + 1 - begin, 0, kSpan) : 0;
    const int64_t to = std::max(from, std::min(kSpan, position + 1 - begin));
    float* s = scores.data() + r * kSpan;
    std::fill_n(s, from, 0.0f);
    std::fill(s + to, s + blocks * kBlock, 0.0f);
    partials[r].most = k.largest(s + from, to - from);
    partials[r].sum = k.exponentials(s + from, to - from, partials[r].most);
    std::fill_n(partials[r].mixed, width_, 0.0f);
  }
  Input p;
  if (packed > 0) {
    of_p.read(scores.data(), Type::f32, rows, packed * kBlock, kSpan, codes, 1);
    p = of_p.input();
  }
  for (int64_t b = 0; b < packed; ++b) {
    Matrix values = block[b].value_matrix;
    if (b + 1 < packed) values.following = block[b + 1].value_matrix.values - values.values;
    k.multiply(values, 0, values.panels, p, mixed.data(), kWidest, scratch.data());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < width_; ++d) partials[r].mixed[d] += mixed[static_cast<size_t>(r * kWidest + d)];
    p.values += kBlock;
    p.codes += kBlock;
    p.scales += kBlock / kSlice;
    p.sums += kBlock / kSlice;
  }
  for (int64_t b = packed; b < blocks; ++b) {
    const int64_t tokens = std::min(kBlock, end - begin - b * kBlock);
    k.product(scores.data() + b * kBlock, kSpan, rows, block[b].values.data(), width_, tokens, width_, partials->mixed,
              sizeof(Partial) / sizeof(float), true);
  }
}

void Cache::attend(const float* q, int64_t tokens, int64_t query_heads, float scale, int64_t window, float* out,
                   int threads) const {
  const int64_t per_token = query_heads / heads_;
  const int64_t begin = length_ - tokens;
  const auto merge = [&](Partial& into, const Partial& other) {
    if (other.sum == 0) return;
    if (into.sum == 0) {
      into.most = other.most;
      into.sum = other.sum;
      std::copy_n(other.mixed, width_, into.mixed);
      return;
    }
    const float most = std::max(into.most, other.most);
    const float a = std::exp(into.most - most), b = std::exp(other.most - most);
    for (int64_t d = 0; d < width_; ++d) into.mixed[d] = into.mixed[d] * a + other.mixed[d] * b;
    into.sum = into.sum * a + other.sum * b;
    into.most = most;
  };
  const auto finish = [&](const Partial& sum, float* to) {
    for (int64_t d = 0; d < width_; ++d) to[d] = sum.mixed[d] / sum.sum;
  };
  if (tokens == 1) {  // spans side by side
    thread_local std::vector<Partial> partials;
    thread_local std::vector<float> scaled;
    const int64_t first = window > 0 ? std::max<int64_t>(0, length_ - window) / kSpan : 0;
    const int64_t spans = ceil_div(length_, kSpan) - first;
    if (partials.size() < static_cast<size_t>(query_heads * spans))
      partials.resize(static_cast<size_t>(query_heads * spans));
    scaled.resize(static_cast<size_t>(query_heads * width_));
    for (size_t i = 0; i < scaled.size(); ++i) scaled[i] = q[i] * scale;
    Partial* all = partials.data();  // [heads][spans][rows]
    const float* rows = scaled.data();
    parallel(threads, heads_ * spans, [&](int64_t unit) {
      const int64_t head = unit / spans;
      attend_span(rows + head * per_token * width_, per_token, per_token, begin, head, first + unit % spans, window,
                  all + unit * per_token);
    });
    for (int64_t row = 0; row < query_heads; ++row) {
      Partial* of_row = all + row / per_token * spans * per_token + row % per_token;
      for (int64_t span = 1; span < spans; ++span) merge(of_row[0], of_row[span * per_token]);
      finish(of_row[0], out + row * width_);
    }
    return;
  }
  const int64_t tokens_at_once = std::max<int64_t>(1, kRowsAtOnce / per_token);
  parallel(threads, heads_ * ceil_div(tokens, tokens_at_once), [&](int64_t unit) {
    const int64_t head = unit % heads_, first = unit / heads_ * tokens_at_once;
    const int64_t count = std::min(tokens_at_once, tokens - first), rows = count * per_token;
    const auto place = [&](int64_t r) {  // of a row in q and out
      return ((first + r / per_token) * query_heads + head * per_token + r % per_token) * width_;
    };
    thread_local std::vector<Partial> sums(kRowsAtOnce), parts(kRowsAtOnce);
    thread_local std::vector<float> scaled(kRowsAtOnce * kWidest);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < width_; ++d) scaled[static_cast<size_t>(r * width_ + d)] = q[place(r) + d] * scale;
    const int64_t position = begin + first;
    const int64_t first_span = window > 0 ? std::max<int64_t>(0, position - window + 1) / kSpan : 0;
    for (int64_t span = first_span; span * kSpan < position + count; ++span) {
      auto& into = span == first_span ? sums : parts;
      attend_span(scaled.data(), rows, per_token, position, head, span, window, into.data());
      if (span == first_span) continue;
      for (int64_t r = 0; r < rows; ++r) merge(sums[static_cast<size_t>(r)], parts[static_cast<size_t>(r)]);
    }
    for (int64_t r = 0; r < rows; ++r) finish(sums[static_cast<size_t>(r)], out + place(r));
  });
}

}  // namespace pliant
