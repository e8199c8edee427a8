// Says which instruction set the kernels use on this CPU.
#pragma once

#if defined(__clang__) || !defined(__GNUC__) || __GNUC__ < 12
#error "fastcss: GCC 12 or newer is what compiles the CPU kernels; set CXX to one"
#endif

#define FASTCSS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define FASTCSS_TARGET(arch) __attribute__((target(arch)))
#define FASTCSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTCSS_CLONES
#endif

namespace fastcss::cpu {

#if defined(__x86_64__)
// The instruction set x86-64-v… that kernels make use of: the highest that they are compiled for and the CPU has whole,
// as the compiler counts it, or less if `asked`, the value of ATEN_CPU_CAPABILITY, is "avx2" or "default".
int level_of(bool has_v3, bool has_v4, const char* asked);
int find_level();
inline const int kLevel = find_level();
#endif

}  // namespace fastcss::cpu
