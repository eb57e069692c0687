// Picks the widest instruction set this processor has. Each kernel file was compiled once per entry of
// ALEXNET_FAST_ISAS (setup.py passes the list), into a namespace of that name.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace alexnet_fast::cpu {

#define DECLARE(name, Params)          \
  int64_t name##_items(const Params&); \
  void name(const Params&, int64_t, int64_t);
#define ENTRY(name, Params) {name##_items, name},
#define ISA(isa)                                                  \
  namespace isa {                                                 \
  ALEXNET_FAST_CPU_KERNELS(DECLARE)                               \
  constexpr Kernels table{#isa, ALEXNET_FAST_CPU_KERNELS(ENTRY)}; \
  }
ISA(baseline)
#if defined(__x86_64__)
ISA(avx2)
ISA(avx512)
#endif
#undef ISA

namespace {

struct Candidate {
  const Kernels* table;
  bool usable;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {{&avx512::table, has_avx512}, {&avx2::table, has_avx2}, {&baseline::table, true}};
#else
  const Candidate candidates[] = {{&baseline::table, true}};
#endif
  const char* wanted = std::getenv("ALEXNET_FAST_ISA");
  for (const Candidate& candidate : candidates) {
    const bool named = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, candidate.table->isa) == 0;
    if (named && candidate.usable) {
      return *candidate.table;
    }
  }
  throw std::runtime_error(std::string("ALEXNET_FAST_ISA=") + wanted + ": not built, or not on this processor");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace alexnet_fast::cpu
