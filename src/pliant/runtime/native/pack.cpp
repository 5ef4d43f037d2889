#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "bf16.h"
#include "cpu.h"
#include "pool.h"

namespace pliant {
namespace {

constexpr int64_t kAlign = 64;
// steps laid out together: rows are often a power of two apart and share few sets of a cache
constexpr int64_t kStepsTogether = 32;

int64_t aligned(int64_t size) { return ceil_div(size, kAlign) * kAlign; }

float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }  // to the nearest integer, of |x| < 2^22

float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

float error_of(const float* w, int64_t n, float scale) {
  const float inverse = 1 / scale;
  float lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) {
      const float off = w[i + l] - clamped(rounded(w[i + l] * inverse), -8, 7) * scale;
      lanes[l] += off * off;
    }
  }
  float sum = 0;
  for (; i < n; ++i) {
    const float off = w[i] - clamped(rounded(w[i] * inverse), -8, 7) * scale;
    sum += off * off;
  }
  for (const float lane : lanes) sum += lane;
  return sum;
}

// The scale of a group of int4 weights with the smallest squared error. Weights that lie on such a grid already get the
// same scale again, because their largest one is 7 or 8 steps.
float scale_of_group(const float* w, int64_t n) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, w[i]);
    high = std::max(high, w[i]);
  }
  const float largest = std::max(-low, high);
  if (!(largest > 1e-30f)) return 0;
  const float sign = -low >= high ? 1.0f : -1.0f;  // -8 is the code of the largest, whatever its sign
  float best = 0, least = INFINITY;
  for (const float steps : {7.0f, 8.0f, 7.5f, 8.5f, 9.0f, 9.5f, 10.0f}) {
    const float scale = from_bf16(to_bf16((steps == 7.0f ? 1.0f : sign) * largest / steps));
    if (scale == 0) continue;
    const float error = error_of(w, n, scale);
    if (error < least) least = error, best = scale;
    if (error == 0) break;
  }
  return best;
}

// The checksum of all words of 8 bytes and their positions, counting the word of the checksum itself as 0.
uint64_t checksum(const uint8_t* data, int64_t size, int threads) {
  constexpr int64_t part = 1 << 17;  // words
  const int64_t words = size / 8;
  std::vector<uint64_t> sums(static_cast<size_t>(ceil_div(words, part)));
  parallel(threads, static_cast<int64_t>(sums.size()), [&](int64_t p) {
    uint64_t sum = 0;
    for (int64_t i = p * part; i < std::min(words, (p + 1) * part); ++i) {
      uint64_t word = 0;
      if (i != static_cast<int64_t>(offsetof(Header, checksum) / 8)) std::memcpy(&word, data + 8 * i, 8);
      word ^= static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15;
      word *= 0xff51afd7ed558ccd;
      word ^= word >> 32;
      sum += word * 0xc4ceb9fe1a85ec53;
    }
    sums[static_cast<size_t>(p)] = sum;
  });
  uint64_t sum = 0;
  for (const uint64_t one : sums) sum += one;
  return sum;
}

uint64_t word_of(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

// Bit i of the result says whether byte i is not zero; in the next two functions, the 16 bits at byte 2i or the i-th
// nibble.
uint64_t bytes_there(uint64_t w) {
  constexpr uint64_t low = 0x7f7f7f7f7f7f7f7f;
  w = (((w & low) + low) | w) >> 7 & 0x0101010101010101;
  return w * 0x0102040810204080 >> 56;
}

uint64_t halves_there(uint64_t w) {
  constexpr uint64_t low = 0x7fff7fff7fff7fff;
  w = (((w & low) + low) | w) >> 15 & 0x0001000100010001;
  return (w | w >> 15 | w >> 30 | w >> 45) & 15;
}

uint64_t nibbles_there(uint64_t w) {
  w = (w | w >> 1 | w >> 2 | w >> 3) & 0x1111111111111111;
  w = (w | w >> 3) & 0x0303030303030303;
  w = (w | w >> 6) & 0x000f000f000f000f;
  w = (w | w >> 12) & 0x000000ff000000ff;
  return (w | w >> 24) & 0xffff;
}

// The mask of a step: which elements are stored. Of every 16 nibbles an even number is.
void mask_of(Format format, const uint8_t* step, uint8_t* mask) {
  for (int w = 0; w < 8; ++w) {
    const uint64_t word = word_of(step + 8 * w);
    if (format == Format::bf16) {
      const uint64_t bits = halves_there(word);
      mask[w / 2] = static_cast<uint8_t>(w & 1 ? mask[w / 2] | bits << 4 : bits);
    } else if (format == Format::int8) {
      mask[w] = static_cast<uint8_t>(bytes_there(word));
    } else {
      auto bits = static_cast<uint32_t>(nibbles_there(word));
      if (__builtin_popcount(bits) & 1) bits |= ~bits & (bits + 1);  // the lowest that is missing
      mask[2 * w] = static_cast<uint8_t>(bits);
      mask[2 * w + 1] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

int64_t count(const uint8_t* mask, int64_t bytes) {
  int64_t bits = 0;
  for (; bytes >= 8; bytes -= 8, mask += 8) {
    uint64_t word;
    std::memcpy(&word, mask, 8);
    bits += __builtin_popcountll(word);
  }
  for (; bytes > 0; --bytes, ++mask) bits += __builtin_popcount(*mask);
  return bits;
}

int64_t bytes_of(Format format, int64_t elements) {
  return format == Format::bf16 ? 2 * elements : format == Format::int8 ? elements : elements / 2;
}

uint8_t* compress(Format format, const uint8_t* step, const uint8_t* mask, uint8_t* out) {
  if (format == Format::int4) {
    for (int w = 0; w < 8; ++w) {
      const uint64_t word = word_of(step + 8 * w);
      uint64_t kept = 0;
      int at = 0;
      for (uint32_t bits = mask[2 * w] | mask[2 * w + 1] << 8; bits; bits &= bits - 1, at += 4) {
        kept |= (word >> 4 * __builtin_ctz(bits) & 15) << at;
      }
      std::memcpy(out, &kept, static_cast<size_t>(at / 8));
      out += at / 8;
    }
    return out;
  }
  for (int64_t byte = 0; byte < mask_bytes(format); ++byte) {
    for (uint32_t bits = mask[byte]; bits; bits &= bits - 1) {
      const int64_t e = 8 * byte + __builtin_ctz(bits);
      if (format == Format::bf16) {
        std::memcpy(out, step + 2 * e, 2);
        out += 2;
      } else {
        *out++ = step[e];
      }
    }
  }
  return out;
}

}  // namespace

Packing::Packing(const float* weight, int64_t rows, int64_t columns, Format format, bool sparse, int64_t group,
                 const float* scales, int threads)
    : panels_(ceil_div(rows, kPanel)),
      steps_(ceil_div(columns, step_inputs(format))),
      group_(format == Format::int4 ? group : columns),
      groups_(ceil_div(columns, group_)) {
  // Not zeroed: the threads that fill it touch it first.
  if (format == Format::bf16) {
    bf16_.reset(new uint16_t[static_cast<size_t>(rows * columns)]);
  } else {
    codes_.reset(new int8_t[static_cast<size_t>(rows * columns)]);
    if (format == Format::int8) scales_.reset(new float[static_cast<size_t>(rows)]);
    if (format == Format::int4) bf16_.reset(new uint16_t[static_cast<size_t>(rows * groups_)]);
  }
  parallel(threads, rows, [&](int64_t r) {
    const float* w = weight + r * columns;
    if (format == Format::bf16) {
      for (int64_t k = 0; k < columns; ++k) {
        const uint16_t bits = to_bf16(w[k]);
        bf16_[r * columns + k] = bits == 0x8000 ? 0 : bits;  // minus zero is zero
      }
      return;
    }
    int8_t* codes = codes_.get() + r * columns;
    if (format == Format::int8) {
      float largest = 0;
      for (int64_t k = 0; k < columns; ++k) largest = std::max(largest, std::fabs(w[k]));
      const float scale = scales ? scales[r] : largest > 1e-30f ? largest / 127 : 0;
      scales_[r] = scale;
      const float inverse = scale != 0 ? 1 / scale : 0;
      for (int64_t k = 0; k < columns; ++k) codes[k] = static_cast<int8_t>(clamped(rounded(w[k] * inverse), -127, 127));
      return;
    }
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t begin = g * group_, n = std::min(group_, columns - begin);
      const float scale = scales ? scales[r * groups_ + g] : scale_of_group(w + begin, n);
      bf16_[r * groups_ + g] = to_bf16(scale);
      const float inverse = scale != 0 ? 1 / scale : 0;
      for (int64_t k = begin; k < begin + n; ++k)
        codes[k] = static_cast<int8_t>(clamped(rounded(w[k] * inverse), -8, 7));
    }
  });

  std::memcpy(header_.magic, kMagic, sizeof kMagic);
  header_.version = kVersion;
  header_.format = static_cast<uint32_t>(format);
  header_.sparse = sparse;
  header_.group = format == Format::int4 ? static_cast<uint32_t>(group) : 0;
  header_.rows = rows;
  header_.columns = columns;
  header_.scales = sizeof(Header);
  header_.offsets = aligned(header_.scales + scale_bytes(format, panels_, groups_));
  header_.masks = aligned(header_.offsets + (sparse ? 8 * (panels_ + 1) : 0));
  header_.values = aligned(header_.masks + (sparse ? panels_ * steps_ * mask_bytes(format) : 0));
  header_.stored = rows * columns;
  int64_t bytes = panels_ * steps_ * kStepBytes;
  if (sparse) {
    offsets_.resize(static_cast<size_t>(panels_) + 1);
    std::vector<int64_t> counts(static_cast<size_t>(panels_));
    parallel(threads, panels_, [&](int64_t p) {
      uint8_t steps[kStepsTogether * kStepBytes], mask[16];
      for (int64_t first = 0; first < steps_; first += kStepsTogether) {
        const int64_t together = std::min(kStepsTogether, steps_ - first);
        stream(p, first, together, steps);
        for (int64_t i = 0; i < together; ++i) {
          mask_of(format, steps + i * kStepBytes, mask);
          counts[static_cast<size_t>(p)] += count(mask, mask_bytes(format));
        }
      }
    });
    header_.stored = 0;
    for (size_t p = 0; p < counts.size(); ++p) {
      header_.stored += counts[p];
      offsets_[p + 1] = offsets_[p] + bytes_of(format, counts[p]);
    }
    bytes = offsets_.back();
  }
  header_.size = aligned(header_.values + bytes + kSlack);
}

void Packing::stream(int64_t panel, int64_t first, int64_t count, uint8_t* out) const {
  const auto format = static_cast<Format>(header_.format);
  const int64_t inputs = step_inputs(format), each = format == Format::bf16 ? 2 : 1;
  const int64_t rows = std::min(kPanel, header_.rows - panel * kPanel);
  const auto* values = format == Format::bf16 ? reinterpret_cast<const uint8_t*>(bf16_.get())
                                              : reinterpret_cast<const uint8_t*>(codes_.get());
  std::memset(out, 0, static_cast<size_t>(count * kStepBytes));
  for (int64_t c = 0; c < rows; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = (first + i) * inputs;
      const int64_t there = std::min(inputs, header_.columns - column);
      const uint8_t* from = values + ((panel * kPanel + c) * header_.columns + column) * each;
      uint64_t codes = 0;
      if (there < inputs) {
        std::memcpy(&codes, from, static_cast<size_t>(there * each));
      } else {
        format == Format::int4 ? std::memcpy(&codes, from, 8) : std::memcpy(&codes, from, 4);
      }
      if (format == Format::int4) {
        codes &= 0x0f0f0f0f0f0f0f0f;
        codes |= codes >> 28;
      }
      std::memcpy(out + i * kStepBytes + 4 * c, &codes, 4);
    }
  }
}

void Packing::write(uint8_t* out, int threads) const {
  const auto format = static_cast<Format>(header_.format);
  std::memset(out, 0, static_cast<size_t>(header_.values));
  for (int64_t r = 0; r < header_.rows; ++r) {
    const int64_t p = r / kPanel, c = r % kPanel;
    if (format == Format::int8) {
      std::memcpy(out + header_.scales + r * 4, &scales_[r], 4);
    } else if (format == Format::int4) {
      for (int64_t g = 0; g < groups_; ++g) {
        std::memcpy(out + header_.scales + ((p * groups_ + g) * kPanel + c) * 2, &bf16_[r * groups_ + g], 2);
      }
    }
  }
  if (header_.sparse) std::memcpy(out + header_.offsets, offsets_.data(), offsets_.size() * 8);
  parallel(threads, panels_, [&](int64_t p) {
    uint8_t* values =
        out + header_.values + (header_.sparse ? offsets_[static_cast<size_t>(p)] : p * steps_ * kStepBytes);
    uint8_t steps[kStepsTogether * kStepBytes];
    for (int64_t first = 0; first < steps_; first += kStepsTogether) {
      const int64_t together = std::min(kStepsTogether, steps_ - first);
      if (!header_.sparse) {
        stream(p, first, together, values + first * kStepBytes);
        continue;
      }
      stream(p, first, together, steps);
      for (int64_t i = 0; i < together; ++i) {
        uint8_t* mask = out + header_.masks + (p * steps_ + first + i) * mask_bytes(format);
        mask_of(format, steps + i * kStepBytes, mask);
        values = compress(format, steps + i * kStepBytes, mask, values);
      }
    }
  });
  const int64_t end = header_.values + (header_.sparse ? offsets_.back() : panels_ * steps_ * kStepBytes);
  std::memset(out + end, 0, static_cast<size_t>(header_.size - end));
  Header header = header_;
  std::memcpy(out, &header, sizeof header);
  header.checksum = checksum(out, header.size, threads);
  std::memcpy(out, &header, sizeof header);
}

std::string open(const uint8_t* data, int64_t size, bool full, int threads, Matrix* out) {
  Header h;
  if (size < static_cast<int64_t>(sizeof h)) return "it has " + std::to_string(size) + " bytes, fewer than its header";
  std::memcpy(&h, data, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) return "bad magic bytes";
  if (h.version != kVersion)
    return "it has version " + std::to_string(h.version) + ", this pliant reads version " + std::to_string(kVersion);
  if (h.format > 2 || h.sparse > 1) return "its header names an unknown format";
  constexpr int64_t most = int64_t{1} << 31;
  if (h.rows < 1 || h.columns < 1 || h.rows > most || h.columns > most) return "its header gives impossible sizes";
  if (h.size != size || size % 8)
    return "it has " + std::to_string(size) + " bytes, but its header declares " + std::to_string(h.size);
  Matrix& m = *out;
  m.format = static_cast<Format>(h.format);
  m.sparse = h.sparse;
  m.rows = h.rows;
  m.columns = h.columns;
  m.panels = ceil_div(h.rows, kPanel);
  m.steps = ceil_div(h.columns, step_inputs(m.format));
  m.chunks = ceil_div(h.columns, kChunk);
  const bool grouped = m.format == Format::int4;
  if (grouped ? h.group != 32 && h.group != 64 && h.group != 128 : h.group != 0)
    return "its header gives an impossible group";
  m.group = grouped ? h.group : h.columns;
  m.groups = ceil_div(h.columns, m.group);
  const int64_t offset_bytes = h.sparse ? 8 * (m.panels + 1) : 0;
  const int64_t masks = h.sparse ? m.panels * m.steps * mask_bytes(m.format) : 0;
  const bool fits = h.scales == static_cast<int64_t>(sizeof h) &&
                    h.offsets >= h.scales + scale_bytes(m.format, m.panels, m.groups) &&
                    h.masks >= h.offsets + offset_bytes && h.values >= h.masks + masks && h.offsets <= size &&
                    h.masks <= size && h.values <= size;
  if (!fits) return "the parts that its header declares do not fit into it";
  m.scales = data + h.scales;
  m.offsets = data + h.offsets;
  m.masks = data + h.masks;
  m.values = data + h.values;
  const int64_t room = size - kSlack - h.values;
  if (!h.sparse && m.panels * m.steps * kStepBytes > room) return "its values do not fit into it";
  if (!full) return "";
  if (checksum(data, size, threads) != h.checksum) return "checksum mismatch: it is damaged";
  if (!h.sparse) return "";
  std::atomic<bool> good{true};
  const auto offset = [&](int64_t p) { return m.panel_values(p) - m.values; };
  parallel(threads, m.panels, [&](int64_t p) {
    const int64_t bytes = m.steps * mask_bytes(m.format);
    const uint8_t* mask = m.panel_masks(p);
    bool right =
        offset(p) >= 0 && offset(p + 1) <= room && offset(p + 1) - offset(p) == bytes_of(m.format, count(mask, bytes));
    if (m.format == Format::int4) {
      for (int64_t i = 0; i < bytes; i += 2) right = right && __builtin_popcount(mask[i] | mask[i + 1] << 8) % 2 == 0;
    }
    if (!right) good = false;
  });
  return good && offset(0) == 0 ? "" : "its masks do not match its values";
}

void unpack(const Matrix& w, float* out, int threads) {
  const Kernels& k = kernels();
  parallel(threads, w.panels, [&](int64_t p) {
    thread_local std::vector<uint8_t> expanded;
    const uint8_t* stream = w.panel_values(p);
    if (w.sparse) {
      expanded.resize(static_cast<size_t>(w.steps * kStepBytes));
      k.expand(w, p, expanded.data());
      stream = expanded.data();
    }
    const int64_t inputs = step_inputs(w.format);
    for (int64_t c = 0; c < std::min(kPanel, w.rows - p * kPanel); ++c) {
      float* row = out + (p * kPanel + c) * w.columns;
      float scale = 1;
      if (w.format == Format::int8) std::memcpy(&scale, w.scales + (p * kPanel + c) * 4, 4);
      for (int64_t i = 0; i < w.columns; ++i) {
        const uint8_t* step = stream + i / inputs * kStepBytes;
        const int64_t k_in = i % inputs;
        if (w.format == Format::bf16) {
          uint16_t bits;
          std::memcpy(&bits, step + 2 * (2 * c + k_in), 2);
          row[i] = from_bf16(bits);
        } else if (w.format == Format::int8) {
          row[i] = static_cast<float>(static_cast<int8_t>(step[4 * c + k_in])) * scale;
        } else {
          uint16_t bits;
          std::memcpy(&bits, w.scales + ((p * w.groups + i / w.group) * kPanel + c) * 2, 2);
          const int nibble = step[4 * c + (k_in & 3)] >> (k_in < 4 ? 0 : 4) & 15;
          row[i] = static_cast<float>((nibble ^ 8) - 8) * from_bf16(bits);
        }
      }
    }
  });
}

}  // namespace pliant
