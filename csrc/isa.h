// The vector kernels, compiled once for each instruction set; `isa()` picks one when the library loads.
//
// The file that includes this one first defines GSSF_KERNELS, the name of a vector_*.h. That file, and
// vector_base.h before it, are included here several times, each time in a namespace of its own and for
// another compiler target; they hold functions only and include only one another. So one build serves every x86-64
// machine; on other processors the plain build has whatever the compiler's own target has.
#pragma once

#ifndef GSSF_KERNELS
#error "define GSSF_KERNELS as the name of the vector_*.h to compile, then include isa.h"
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "types.h"

#define GSSF_INLINE __attribute__((always_inline)) static inline

// In each of them kRegisters says how many 64-byte vectors the processor's registers hold.
namespace gssf::plain {
#ifdef __aarch64__
constexpr int kRegisters = 8;
#else
constexpr int kRegisters = 4;
#endif
#include "vector_base.h"
#include GSSF_KERNELS
}  // namespace gssf::plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GSSF_X86_LEVELS 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace gssf::v3 {
constexpr int kRegisters = 8;
#include "vector_base.h"
#include GSSF_KERNELS
}  // namespace gssf::v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4", "prefer-vector-width=512")
namespace gssf::v4 {
constexpr int kRegisters = 32;
#include "vector_base.h"
#include GSSF_KERNELS
}  // namespace gssf::v4
#pragma GCC pop_options
#endif

namespace gssf {

enum class Isa { plain, v3, v4 };

inline Isa isa() {
#ifdef GSSF_X86_LEVELS
  static const Isa best = __builtin_cpu_supports("x86-64-v4")   ? Isa::v4
                          : __builtin_cpu_supports("x86-64-v3") ? Isa::v3
                                                                : Isa::plain;
  return best;
#else
  return Isa::plain;
#endif
}

}  // namespace gssf

// GSSF_VECTORIZED(f, args...) calls f of the best instruction set this processor has.
#ifdef GSSF_X86_LEVELS
#define GSSF_VECTORIZED(f, ...)                                    \
  (::gssf::isa() == ::gssf::Isa::v4   ? ::gssf::v4::f(__VA_ARGS__) \
   : ::gssf::isa() == ::gssf::Isa::v3 ? ::gssf::v3::f(__VA_ARGS__) \
                                      : ::gssf::plain::f(__VA_ARGS__))
#else
#define GSSF_VECTORIZED(f, ...) ::gssf::plain::f(__VA_ARGS__)
#endif
