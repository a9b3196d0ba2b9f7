// How kernels that are compiled once per instruction set reach Python. Include after csrc/isa.h.
//
// A source defines KERNELS(set), a struct whose functions are FORWARD(set, function) for those of gssf::set that it
// binds, writes FOR_EACH_SET(KERNELS), and binds a template over such structs with BIND_EACH_SET(bind, internals).
#pragma once

#include "bindings.h"

#ifdef GSSF_X86_LEVELS
#define FOR_EACH_SET(macro) macro(plain) macro(v3) macro(v4)
#define BIND_EACH_SET(bind, internals)          \
  bind<plain_kernels>(set(internals, "plain")); \
  bind<v3_kernels>(set(internals, "v3"));       \
  bind<v4_kernels>(set(internals, "v4"))
#else
#define FOR_EACH_SET(macro) macro(plain)
#define BIND_EACH_SET(bind, internals) bind<plain_kernels>(set(internals, "plain"))
#endif

#define FORWARD(set, function)                                         \
  template <class... Arguments>                                        \
  static auto function(Arguments&&... arguments) {                     \
    return gssf::set::function(std::forward<Arguments>(arguments)...); \
  }

inline py::module_ set(py::module_& internals, const char* name) { return internals.def_submodule(name); }
