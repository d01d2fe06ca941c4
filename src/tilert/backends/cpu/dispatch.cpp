// Which table of kernels this machine can run.
#include "kernels.h"

namespace tilert {

namespace portable {
extern const Kernels kernels;
}
#if defined(TILERT_X86_KERNELS)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

const Kernels* find_kernels(const std::string& isa) {
#if defined(TILERT_X86_KERNELS)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  if (has_avx512 && (isa.empty() || isa == "avx512")) return &avx512::kernels;
  if (has_avx2 && (isa.empty() || isa == "avx2")) return &avx2::kernels;
#endif
  if (isa.empty() || isa == "portable") return &portable::kernels;
  return nullptr;
}

}  // namespace tilert
