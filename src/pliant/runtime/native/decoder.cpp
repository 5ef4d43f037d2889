#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "buffer.h"
#include "cpu.h"
#include "pool.h"

namespace pliant {
namespace {

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void norm(const float* x, const float* weight, int64_t n, double epsilon, float* out) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t l = 0; l < 16; ++l) lanes[l] += x[i + l] * x[i + l];
  float sum = 0;
  for (; i < n; ++i) sum += x[i] * x[i];
  for (const float lane : lanes) sum += lane;
  const auto factor = static_cast<float>(1 / std::sqrt(static_cast<double>(sum) / static_cast<double>(n) + epsilon));
  for (i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

// Rotates the two halves of the first `rotated` elements of every head.
void rotate(float* x, int64_t heads, int64_t width, const float* cosine, const float* sine, int64_t rotated) {
  const int64_t half = rotated / 2;
  for (int64_t h = 0; h < heads; ++h, x += width) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cosine[i] - b * sine[i];
      x[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
  }
}

std::string look(const Projection& part, const char* name, int64_t rows, int64_t columns, Matrix* out) {
  const std::string wrong = open(part.data, part.size, false, 1, out);
  if (!wrong.empty()) return std::string(name) + ": " + wrong;
  if (out->rows != rows || out->columns != columns)
    return std::string(name) + " is a matrix of " + std::to_string(out->rows) + " x " + std::to_string(out->columns) +
           ", not of " + std::to_string(rows) + " x " + std::to_string(columns);
  return "";
}

// The values as floats: in place if they are floats, else widened into `to`.
const float* floats(const Vector& from, int64_t n, std::vector<float>& to) {
  const auto type = static_cast<Type>(from.type);
  if (!from.data || type == Type::f32) return static_cast<const float*>(from.data);
  kernels().widen(from.data, type, n, room(to, n), n);
  return to.data();
}

Task task_of(const Matrix& w, const Projection& part, std::vector<float>& bias, float* out) {
  Task task;
  task.weight = &w;
  task.bias = floats(part.bias, w.rows, bias);
  task.out = out;
  task.stride = w.rows;
  return task;
}

}  // namespace

std::string Decoder::add(const LayerPlan& plan) {
  Layer layer;
  layer.plan = plan;
  layer.attention = plan.q.data != nullptr;
  layer.mlp = plan.gate.data != nullptr;
  const int64_t hidden = plan_.hidden, width = plan_.width;
  if (layer.attention) {
    if (plan.kv_heads < 1 || plan.heads % plan.kv_heads || plan.heads / plan.kv_heads > kMostSharing || width > kWidest)
      return std::to_string(plan.heads) + " heads, " + std::to_string(plan.kv_heads) + " key-value heads and width " +
             std::to_string(width) + " are not supported";
    for (const std::string& wrong : {look(plan.q, "q", plan.heads * width, hidden, &layer.q),
                                     look(plan.k, "k", plan.kv_heads * width, hidden, &layer.k),
                                     look(plan.v, "v", plan.kv_heads * width, hidden, &layer.v),
                                     look(plan.o, "o", hidden, plan.heads * width, &layer.o)}) {
      if (!wrong.empty()) return wrong;
    }
  }
  if (layer.mlp) {
    if (std::string wrong = open(plan.gate.data, plan.gate.size, false, 1, &layer.gate); !wrong.empty())
      return "gate: " + wrong;
    const int64_t channels = layer.gate.rows;
    for (const std::string& wrong :
         {look(plan.gate, "gate", channels, hidden, &layer.gate), look(plan.up, "up", channels, hidden, &layer.up),
          look(plan.down, "down", hidden, channels, &layer.down)}) {
      if (!wrong.empty()) return wrong;
    }
  }
  for (const Projection* part : {&plan.q, &plan.k, &plan.v, &plan.o, &plan.gate, &plan.up, &plan.down}) {
    if (!part->data) continue;
    layer.headers.emplace_back(part->data, Header{});
    std::memcpy(&layer.headers.back().second, part->data, sizeof(Header));
  }
  layers_.push_back(std::move(layer));
  return "";
}

bool Decoder::run(float* stream, int64_t tokens, const float* cosine, const float* sine, int64_t rotated,
                  Cache* const* caches, int threads, int64_t* spent) {
  const std::lock_guard alone(running_);  // the buffers are this decoder's
  for (const Layer& layer : layers_)
    for (const auto& [data, header] : layer.headers)
      if (std::memcmp(data, &header, offsetof(Header, checksum)) != 0) return false;
  const int64_t hidden = plan_.hidden, width = plan_.width;
  float* normed = room(normed_, tokens * hidden);
  const auto codes = [](std::initializer_list<const Matrix*> matrices) {
    for (const Matrix* w : matrices)
      if (w->format != Format::bf16) return true;
    return false;
  };
  const auto normalise = [&](const Vector& of) {
    const float* weight = floats(of, hidden, widened_[0]);
    parallel(tokens < 16 ? 1 : threads, tokens,
             [&](int64_t t) { norm(stream + t * hidden, weight, hidden, plan_.epsilon, normed + t * hidden); });
  };
  const auto add_to_stream = [&](const Matrix& w, const Projection& part) {
    Task task = task_of(w, part, widened_[0], stream);
    task.accumulate = true;
    linear(&task, 1, rows_.input(), threads);
  };
  int64_t in_products = 0, in_attention = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const LayerPlan& plan = layer.plan;
    if (layer.attention) {
      normalise(plan.attention_norm);
      const int64_t q_size = plan.heads * width, kv_size = plan.kv_heads * width;
      float* q = room(q_, tokens * q_size);
      float* k = room(k_, tokens * kv_size);
      float* v = room(v_, tokens * kv_size);
      float* mixed = room(mixed_, tokens * q_size);
      int64_t began = now();
      rows_.read(normed, Type::f32, tokens, hidden, hidden, codes({&layer.q, &layer.k, &layer.v}), threads);
      const Task three[] = {task_of(layer.q, plan.q, widened_[0], q), task_of(layer.k, plan.k, widened_[1], k),
                            task_of(layer.v, plan.v, widened_[2], v)};
      linear(three, 3, rows_.input(), threads);
      in_products += now() - began;
      const float* q_norm = floats(plan.q_norm, width, widened_[0]);
      const float* k_norm = floats(plan.k_norm, width, widened_[1]);
      for (int64_t t = 0; t < tokens; ++t) {
        float* own_q = q + t * q_size;
        float* own_k = k + t * kv_size;
        if (q_norm)
          for (int64_t h = 0; h < plan.heads; ++h)
            norm(own_q + h * width, q_norm, width, plan_.epsilon, own_q + h * width);
        if (k_norm)
          for (int64_t h = 0; h < plan.kv_heads; ++h)
            norm(own_k + h * width, k_norm, width, plan_.epsilon, own_k + h * width);
        if (plan.rotary) {
          rotate(own_q, plan.heads, width, cosine + t * rotated, sine + t * rotated, rotated);
          rotate(own_k, plan.kv_heads, width, cosine + t * rotated, sine + t * rotated, rotated);
        }
      }
      began = now();
      caches[i]->append(k, v, tokens, kv_size);
      caches[i]->attend(q, tokens, plan.heads, static_cast<float>(plan_.scale), plan.window, mixed, threads);
      caches[i]->settle(threads);
      in_attention += now() - began;
      began = now();
      rows_.read(mixed, Type::f32, tokens, q_size, q_size, codes({&layer.o}), threads);
      add_to_stream(layer.o, plan.o);
      in_products += now() - began;
    }
    if (layer.mlp) {
      normalise(plan.mlp_norm);
      float* inner = room(inner_, tokens * layer.gate.rows);
      const int64_t began = now();
      rows_.read(normed, Type::f32, tokens, hidden, hidden, codes({&layer.gate, &layer.up}), threads);
      Task gated = task_of(layer.gate, plan.gate, widened_[0], inner);
      gated.up = &layer.up;
      gated.up_bias = floats(plan.up.bias, layer.up.rows, widened_[1]);
      gated.activation = static_cast<Activation>(plan_.activation);
      linear(&gated, 1, rows_.input(), threads);
      rows_.read(inner, Type::f32, tokens, layer.gate.rows, layer.gate.rows, codes({&layer.down}), threads);
      add_to_stream(layer.down, plan.down);
      in_products += now() - began;
    }
  }
  normalise(plan_.final_norm);
  std::copy_n(normed, tokens * hidden, stream);
  spent[0] += in_products;
  spent[1] += in_attention;
  return true;
}

}  // namespace pliant
