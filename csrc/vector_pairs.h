// score[e] = a[rows[e]] · b[cols[e]], and the gather of the gradients. See isa.h.

// s + x y, fused where the products of this target are: every target with more registers than SSE has the instruction.
template <class A>
GSSF_INLINE A multiply_add(A x, A y, A s) {
  if constexpr (kRegisters >= 8) return std::fma(x, y, s);
  else return s + x * y;
}

// x · y with the bits of a product's element: chains of kChain channels, added up in order (vector_product.h).
template <class A>
GSSF_INLINE A chained_dot(const A* x, const A* y, int64_t dim) {
  constexpr int64_t kTogether = 8;  // chains that are summed side by side
  A total = 0;
  int64_t l = 0;
  for (; l + kTogether * kChain <= dim; l += kTogether * kChain) {
    A sum[kTogether] = {};
    for (int64_t k = 0; k < kChain; ++k)
      for (int64_t c = 0; c < kTogether; ++c)
        sum[c] = multiply_add(x[l + c * kChain + k], y[l + c * kChain + k], sum[c]);
    for (int64_t c = 0; c < kTogether; ++c) total += sum[c];
  }
  for (; l < dim; l += kChain) {
    A sum = 0;
    for (int64_t k = l; k < std::min(l + kChain, dim); ++k) sum = multiply_add(x[k], y[k], sum);
    total += sum;
  }
  return total;
}

template <class T, class A>
GSSF_INLINE void pair_scores_range(const T* a, const T* b, const int64_t* rows, const int64_t* cols, A* out,
                                   int64_t dim, int64_t begin, int64_t end) {
  std::vector<A> wide(2 * dim);
  for (int64_t e = begin; e < end; ++e) {
    if (rows[e] < 0 || cols[e] < 0) {
      out[e] = -std::numeric_limits<A>::infinity();
      continue;
    }
    const T *x = a + rows[e] * dim, *y = b + cols[e] * dim;
    if constexpr (std::is_same_v<T, A>) {
      out[e] = chained_dot<A>(x, y, dim);
    } else {
      convert(wide.data(), x, dim);
      convert(wide.data() + dim, y, dim);
      out[e] = chained_dot<A>(wide.data(), wide.data() + dim, dim);
    }
  }
}

// Rows begin .. end of the gathered gradient: see gather_row.
template <class T, class A>
GSSF_INLINE void gather_range(const T* x, const int64_t* source, const A* dscores, const Groups& groups, T* out,
                              int64_t dim, int64_t begin, int64_t end) {
  std::vector<A> sum(dim), wide(dim);
  for (int64_t d = begin; d < end; ++d) {
    gather_row(x, source, dscores, groups, d, dim, false, wide.data(), sum.data());
    convert(out + d * dim, sum.data(), dim);
  }
}

#define GSSF_PAIR_KERNELS(T, A)                                                                                      \
  static void pair_scores_run(const T* a, const T* b, const int64_t* rows, const int64_t* cols, A* out, int64_t dim, \
                              int64_t begin, int64_t end) {                                                          \
    pair_scores_range<T, A>(a, b, rows, cols, out, dim, begin, end);                                                 \
  }                                                                                                                  \
  static void gather_run(const T* x, const int64_t* source, const A* dscores, const Groups& groups, T* out,          \
                         int64_t dim, int64_t begin, int64_t end) {                                                  \
    gather_range<T, A>(x, source, dscores, groups, out, dim, begin, end);                                            \
  }
GSSF_PAIR_KERNELS(float, float)
GSSF_PAIR_KERNELS(double, double)
GSSF_PAIR_KERNELS(c10::BFloat16, float)
GSSF_PAIR_KERNELS(c10::Half, float)
#undef GSSF_PAIR_KERNELS
