// Loads, stores, conversions and a dot product. See isa.h.

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
