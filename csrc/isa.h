// The vector kernels, compiled once for each instruction set; `isa()` picks one when the library loads.
//
// A file that includes this one first defines GSSF_KERNELS, the name of a vector_*.h. That file, and vector_base.h
// before it, are included here several times, each time in a separate namespace and for another compiler target; they
// contain functions only and include only one another. So one build serves every x86-64 machine; on other processors
// the plain build uses the compiler's default target.
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

// kRegisters: how many 64-byte vectors the registers of each target hold; kRegisterBytes: the size of one register.
namespace gssf::plain {
#ifdef __aarch64__
constexpr int kRegisters = 8;
#else
constexpr int kRegisters = 4;
#endif
constexpr int kRegisterBytes = 16;
#include "vector_base.h"
#include GSSF_KERNELS
}  // namespace gssf::plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GSSF_X86_LEVELS 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace gssf::v3 {
constexpr int kRegisters = 8, kRegisterBytes = 32;
#include "vector_base.h"
#include GSSF_KERNELS
}  // namespace gssf::v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4", "prefer-vector-width=512")
namespace gssf::v4 {
constexpr int kRegisters = 32, kRegisterBytes = 64;
#include "vector_base.h"
#include GSSF_KERNELS
}  // namespace gssf::v4
#pragma GCC pop_options
#endif

namespace gssf {

enum class Isa { plain, v3, v4 };

inline Isa isa() {
#ifdef GSSF_X86_LEVELS
  static const Isa widest = __builtin_cpu_supports("x86-64-v4")   ? Isa::v4
                            : __builtin_cpu_supports("x86-64-v3") ? Isa::v3
                                                                  : Isa::plain;
  return widest;
#else
  return Isa::plain;
#endif
}

}  // namespace gssf

// GSSF_VECTORIZED(f, args...) calls the f of the widest instruction set that this processor has.
#ifdef GSSF_X86_LEVELS
#define GSSF_VECTORIZED(f, ...)                                    \
  (::gssf::isa() == ::gssf::Isa::v4   ? ::gssf::v4::f(__VA_ARGS__) \
   : ::gssf::isa() == ::gssf::Isa::v3 ? ::gssf::v3::f(__VA_ARGS__) \
                                      : ::gssf::plain::f(__VA_ARGS__))
#else
#define GSSF_VECTORIZED(f, ...) ::gssf::plain::f(__VA_ARGS__)
#endif
