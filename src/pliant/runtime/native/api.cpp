// The functions that Python calls, as plain C: pointers and numbers, no types of Python or torch.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu.h"
#include "decoder.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace pliant;

namespace {

thread_local std::string message;

int failed(const std::string& reason) {
  message = reason;
  return reason.empty() ? 0 : 1;
}

}  // namespace

#define PLIANT_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature below or the packed form changes.
PLIANT_API int pliant_abi() { return 3; }

// The fields of a packed matrix's header, "name offset size" each, separated by spaces. Python declares them as well.
PLIANT_API const char* pliant_header() {
#define PLIANT_FIELD(name) \
  #name " " + std::to_string(offsetof(Header, name)) + " " + std::to_string(sizeof(Header::name)) + " "
  static const std::string fields = std::string() + PLIANT_FIELD(magic) + PLIANT_FIELD(version) + PLIANT_FIELD(format) +
                                    PLIANT_FIELD(sparse) + PLIANT_FIELD(group) + PLIANT_FIELD(rows) +
                                    PLIANT_FIELD(columns) + PLIANT_FIELD(stored) + PLIANT_FIELD(scales) +
                                    PLIANT_FIELD(offsets) + PLIANT_FIELD(masks) + PLIANT_FIELD(values) +
                                    PLIANT_FIELD(size) + PLIANT_FIELD(checksum) + PLIANT_FIELD(unused);
#undef PLIANT_FIELD
  return fields.c_str();
}

// Why the last call of this thread failed.
PLIANT_API const char* pliant_message() { return message.c_str(); }

// Name of the i-th instruction set that can be chosen, null after the last.
PLIANT_API const char* pliant_available(int i) {
  return i < static_cast<int>(available().size()) ? available()[static_cast<size_t>(i)]->name : nullptr;
}

PLIANT_API const char* pliant_isa() { return kernels().name; }

PLIANT_API int pliant_choose(const char* name) { return choose(name) ? 0 : 1; }

// Memory for packed matrices, in huge pages if the system has them: a matrix is read faster from those.
PLIANT_API void* pliant_allocate(int64_t size) {
  constexpr int64_t page = 2 << 20;
  const int64_t whole = size >= page ? ceil_div(size, page) * page : ceil_div(size, 64) * 64;
  void* memory = std::aligned_alloc(size >= page ? page : 64, static_cast<size_t>(whole));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (memory && size >= page) madvise(memory, static_cast<size_t>(whole), MADV_HUGEPAGE);
#endif
  return memory;
}

PLIANT_API void pliant_free(void* memory) { std::free(memory); }

// Reads memory and does nothing else, on every thread at three positions at once: an upper bound for the kernels.
// `size` is a multiple of 3 << 18 bytes.
PLIANT_API uint64_t pliant_stream(const uint64_t* memory, int64_t size, int threads) {
  constexpr int64_t part = (1 << 18) / sizeof(uint64_t);
  std::atomic<uint64_t> all{0};
  parallel(threads, size / (3 << 18), [&](int64_t chunk) {
    const uint64_t* first = memory + chunk * 3 * part;
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < part; i += 8) {
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s)
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) sums[l] += first[s * part + i + l];
    }
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) all += sums[l];
  });
  return all;
}

PLIANT_API void* pliant_pack(const float* weight, int64_t rows, int64_t columns, int format, int sparse, int64_t group,
                             const float* scales, int threads, int64_t* size) {
  auto* packing = new Packing(weight, rows, columns, static_cast<Format>(format), sparse != 0, group, scales, threads);
  *size = packing->size();
  return packing;
}

PLIANT_API void pliant_pack_write(void* packing, uint8_t* out, int threads) {
  static_cast<Packing*>(packing)->write(out, threads);
}

PLIANT_API void pliant_pack_end(void* packing) { delete static_cast<Packing*>(packing); }

// Checks every part of a packed matrix before it is used.
PLIANT_API int pliant_verify(const uint8_t* data, int64_t size, int threads) {
  Matrix w;
  return failed(open(data, size, true, threads, &w));
}

PLIANT_API int pliant_unpack(const uint8_t* data, int64_t size, float* out, int threads) {
  Matrix w;
  const std::string wrong = open(data, size, false, threads, &w);
  if (wrong.empty()) unpack(w, out, threads);
  return failed(wrong);
}

// y[rows][stride_y] = x[rows][stride_x] W^T + bias, in floats, bf16 or f16 (0, 1, 2); bias is in floats or null.
// `columns` and `outputs` are the sizes for which the caller has room.
PLIANT_API int pliant_linear(const uint8_t* data, int64_t size, int64_t columns, int64_t outputs, const void* x,
                             int x_type, int64_t rows, int64_t x_stride, const float* bias, void* y, int y_type,
                             int64_t y_stride, int threads) {
  Matrix w;
  const std::string wrong = open(data, size, false, threads, &w);
  if (!wrong.empty()) return failed(wrong);
  if (w.columns != columns || w.rows != outputs) {
    return failed("it has " + std::to_string(w.rows) + " outputs of " + std::to_string(w.columns) + " inputs, not " +
                  std::to_string(outputs) + " of " + std::to_string(columns));
  }
  thread_local PreparedRows ready;
  ready.read(x, static_cast<Type>(x_type), rows, w.columns, x_stride, w.format != Format::bf16, threads);
  Task task;
  task.weight = &w;
  task.bias = bias;
  task.out = y;
  task.type = static_cast<Type>(y_type);
  task.stride = y_stride;
  linear(&task, 1, ready.input(), threads);
  return 0;
}

// Caches of keys and values, one for every layer.

PLIANT_API void* pliant_cache_new(int64_t heads, int64_t width, const Keeping* keeping) {
  return new Cache(heads, width, *keeping);
}

PLIANT_API void* pliant_cache_copy(const void* cache) { return new Cache(*static_cast<const Cache*>(cache)); }

PLIANT_API void pliant_cache_end(void* cache) { delete static_cast<Cache*>(cache); }

PLIANT_API int64_t pliant_cache_length(const void* cache) { return static_cast<const Cache*>(cache)->length(); }

PLIANT_API int64_t pliant_cache_bytes(const void* cache) { return static_cast<const Cache*>(cache)->bytes(); }

PLIANT_API void pliant_cache_crop(void* cache, int64_t length) { static_cast<Cache*>(cache)->crop(length); }

PLIANT_API void pliant_cache_append(void* cache, const float* keys, const float* values, int64_t tokens,
                                    int64_t stride) {
  static_cast<Cache*>(cache)->append(keys, values, tokens, stride);
}

PLIANT_API void pliant_cache_settle(void* cache, int threads) { static_cast<Cache*>(cache)->settle(threads); }

PLIANT_API void pliant_cache_read(const void* cache, float* keys, float* values) {
  static_cast<const Cache*>(cache)->read(keys, values);
}

PLIANT_API void pliant_cache_attend(const void* cache, const float* q, int64_t tokens, int64_t query_heads,
                                    double scale, int64_t window, float* out, int threads) {
  static_cast<const Cache*>(cache)->attend(q, tokens, query_heads, static_cast<float>(scale), window, out, threads);
}

// All layers of a decoder in one call.

PLIANT_API void* pliant_decoder_new(const DecoderPlan* plan) { return new Decoder(*plan); }

PLIANT_API void pliant_decoder_end(void* decoder) { delete static_cast<Decoder*>(decoder); }

PLIANT_API int pliant_decoder_add(void* decoder, const LayerPlan* plan) {
  return failed(static_cast<Decoder*>(decoder)->add(*plan));
}

PLIANT_API int pliant_decoder_run(void* decoder, float* stream, int64_t tokens, const float* cosine, const float* sine,
                                  int64_t rotated, void* const* caches, int threads, int64_t* spent) {
  return static_cast<Decoder*>(decoder)->run(stream, tokens, cosine, sine, rotated,
                                             reinterpret_cast<Cache* const*>(caches), threads, spent);
}
