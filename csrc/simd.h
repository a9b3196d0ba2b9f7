// Portable SIMD: 64-byte vectors of GCC and Clang, which lower to AVX-512, 2 x AVX2, 4 x SSE2 or NEON.
//
// A function marked GSSF_CLONES is compiled for each instruction set and picked when the library is
// loaded, so one build serves every x86-64 machine. Everything it calls must be GSSF_INLINE.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define GSSF_INLINE __attribute__((always_inline)) inline
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define GSSF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GSSF_CLONES
#endif

namespace gssf {

// The dtype of scores and sums for inputs of type T.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct Simd;

template <>
struct Simd<float> {
  using Vector = float __attribute__((vector_size(64)));
  using Index = int32_t __attribute__((vector_size(64)));  // as wide as a comparison's result
  using Lane = int32_t;
  static constexpr int64_t lanes = 16;
};

template <>
struct Simd<double> {
  using Vector = double __attribute__((vector_size(64)));
  using Index = int64_t __attribute__((vector_size(64)));
  using Lane = int64_t;
  static constexpr int64_t lanes = 8;
};

template <class V>
GSSF_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
GSSF_INLINE void store(void* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// out[0:n] = in[0:n] in another floating type; plain loops that the compiler vectorises.
template <class To, class From>
GSSF_INLINE void convert(To* out, const From* in, int64_t n) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(out, in, n * sizeof(To));
  } else {
    for (int64_t k = 0; k < n; ++k) out[k] = static_cast<To>(in[k]);
  }
}

template <class A>
GSSF_INLINE A sum_lanes(const typename Simd<A>::Vector& v) {
  A total = 0;
  for (int64_t k = 0; k < Simd<A>::lanes; ++k) total += v[k];
  return total;
}

// Sum of x[k] * y[k] in A, for x and y already in A.
template <class A>
GSSF_INLINE A dot(const A* x, const A* y, int64_t n) {
  using V = typename Simd<A>::Vector;
  constexpr int64_t L = Simd<A>::lanes;
  V sum0{}, sum1{};
  int64_t k = 0;
  for (; k + 2 * L <= n; k += 2 * L) {
    sum0 += load<V>(x + k) * load<V>(y + k);
    sum1 += load<V>(x + k + L) * load<V>(y + k + L);
  }
  for (; k + L <= n; k += L) sum0 += load<V>(x + k) * load<V>(y + k);
  A total = sum_lanes<A>(sum0 + sum1);
  for (; k < n; ++k) total += x[k] * y[k];
  return total;
}

}  // namespace gssf
