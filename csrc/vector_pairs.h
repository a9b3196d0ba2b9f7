// score[e] = a[rows[e]] · b[cols[e]], and the gather of the gradients. See isa.h.

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
      out[e] = dot<A>(x, y, dim);
    } else {
      convert(wide.data(), x, dim);
      convert(wide.data() + dim, y, dim);
      out[e] = dot<A>(wide.data(), wide.data() + dim, dim);
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
