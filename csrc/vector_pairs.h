// Scores of listed pairs, and the gather of their gradients. See isa.h.

template <class T, class A>
GSSF_INLINE void pair_scores_range(
    const T* a, const T* b, const int64_t* rows, const int64_t* cols, A* out, int64_t dim, int64_t begin, int64_t end) {
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

// out[d] = sum of grad[e] * x[source[e]] over the edges e of destination d; zero gradients add nothing.
template <class T, class A>
GSSF_INLINE void gather_range(
    const T* x, const int64_t* source, const A* grad, const Groups& groups, T* out, int64_t dim, int64_t begin,
    int64_t end) {
  std::vector<A> sum(dim), wide(dim);
  for (int64_t d = begin; d < end; ++d) {
    std::fill(sum.begin(), sum.end(), A(0));
    for (int64_t g = groups.first[d]; g < groups.first[d + 1]; ++g) {
      const int64_t e = groups.edge[g];
      if (grad[e] == 0) continue;
      const A weight = grad[e];
      A* total = sum.data();
      if constexpr (std::is_same_v<T, A>) {
        const A* row = x + source[e] * dim;
        for (int64_t k = 0; k < dim; ++k) total[k] += weight * row[k];
      } else {
        convert(wide.data(), x + source[e] * dim, dim);
        const A* row = wide.data();
        for (int64_t k = 0; k < dim; ++k) total[k] += weight * row[k];
      }
    }
    convert(out + d * dim, sum.data(), dim);
  }
}

#define GSSF_PAIR_CLONES(T, A)                                                                                   \
  static void pair_scores_run(const T* a, const T* b, const int64_t* rows, const int64_t* cols, A* out,      \
                                   int64_t dim, int64_t begin, int64_t end) {                                     \
    pair_scores_range<T, A>(a, b, rows, cols, out, dim, begin, end);                                              \
  }                                                                                                               \
  static void gather_run(const T* x, const int64_t* source, const A* grad, const Groups& groups, T* out,     \
                              int64_t dim, int64_t begin, int64_t end) {                                          \
    gather_range<T, A>(x, source, grad, groups, out, dim, begin, end);                                            \
  }
GSSF_PAIR_CLONES(float, float)
GSSF_PAIR_CLONES(double, double)
GSSF_PAIR_CLONES(c10::BFloat16, float)
GSSF_PAIR_CLONES(c10::Half, float)
#undef GSSF_PAIR_CLONES
