#include "cpu.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

// The register files that the operating system saves. xgetbv is given by its bytes, as its intrinsic needs a flag.
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

[[maybe_unused]] bool has_avx512() {
  const Registers seven = cpuid(7), more = cpuid(7, 1);
  return has_avx2() && (saved() & 0xe6) == 0xe6                                           //
         && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31)  // F, DQ, BW, VL
         && bit(seven.c, 1) && bit(seven.c, 6) && bit(seven.c, 11) && bit(more.a, 5);     // VBMI, VBMI2, VNNI, BF16
}

[[maybe_unused]] bool has_amx() {
  const Registers seven = cpuid(7);
  if (!has_avx512() || !bit(seven.d, 24) || !bit(seven.d, 22) || !bit(seven.d, 25)) return false;  // TILE, BF16, INT8
  if ((saved() & 0x60000) != 0x60000) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;  // once per process, for all its threads
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#endif

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#if defined(PLIANT_AMX)
  if (has_amx()) found.push_back(&amx_kernels());
#endif
#if defined(PLIANT_AVX512)
  if (has_avx512()) found.push_back(&avx512_kernels());
#endif
#if defined(PLIANT_AVX2)
  if (has_avx2()) found.push_back(&avx2_kernels());
#endif
  found.push_back(&scalar_kernels());
  found.push_back(&emulated_avx512_kernels());
  found.push_back(&emulated_amx_kernels());
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen = available().front();
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
