#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace fastcss::cpu {

#if defined(__x86_64__)
int level_of(bool has_v3, bool has_v4, const char* asked) {
  const auto asks_for = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  if (!has_v3 || asks_for("default")) return 1;
  return has_v4 && !asks_for("avx2") ? 4 : 3;
}

// A CPU, or a virtual one, may have AVX2 and lack another part of the level. F16C, BMI2, … are used too, so the whole
// level is asked for.
int find_level() {
  return level_of(__builtin_cpu_supports("x86-64-v3"), __builtin_cpu_supports("x86-64-v4"),
                  std::getenv("ATEN_CPU_CAPABILITY"));
}
#endif

}  // namespace fastcss::cpu
