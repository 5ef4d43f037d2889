#include "cpu.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pliant {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part = 0) {
  Registers r;
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, part, r.a, r.b, r.c, r.d);
  return r;
}

bool bit(uint32_t word, int place) { return word >> place & 1; }

// The register files that the operating system saves. xgetbv by its bytes: its intrinsic needs a flag of its own.
uint64_t saved() {
  if (!bit(cpuid(1).c, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  asm volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

[[maybe_unused]] bool has_avx2() {
  const Registers one = cpuid(1), seven = cpuid(7);
  return (saved() & 0x6) == 0x6 && bit(one.c, 12) && bit(one.c, 23) && bit(one.c, 29)  // FMA, POPCNT, F16C
         && bit(seven.b, 5) && bit(seven.b, 3) && bit(seven.b, 8);                     // AVX2, BMI1, BMI2
}

#endif

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#if defined(PLIANT_AVX2)
  if (has_avx2()) found.push_back(&avx2_kernels());
#endif
  found.push_back(&scalar_kernels());
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen = [] {
    const char* wanted = std::getenv("PLIANT_ISA");
    for (const Kernels* one : available()) {
      if (wanted && std::string(wanted) == one->name) return one;
    }
    return available().front();
  }();
  return chosen;
}

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> all = find();
  return all;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool choose(const std::string& name) {
  for (const Kernels* one : available()) {
    if (name == one->name) {
      current().store(one);
      return true;
    }
  }
  return false;
}

}  // namespace pliant
