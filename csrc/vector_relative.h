// Sums of one tile for the relative negatives. See isa.h.

template <class A>
struct ExpOf;

template <>
struct ExpOf<float> {
  static constexpr float kLeast = -87.33654f;      // log of the smallest normal number
  static constexpr float kRounder = 12582912.f;    // 1.5 * 2^23: adding it leaves a whole number in the low bits
  static constexpr float kLn2High = 0.693359375f;  // its multiples up to 126 are exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
};

template <>
struct ExpOf<double> {
  static constexpr double kLeast = -708.396418532264, kRounder = 6755399441055744.;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
};

// e^x for x <= 0, to an ulp or two: x = n log 2 + r, |r| <= log 2 / 2, and Taylor's series of e^r. 0 where it would
// be subnormal; NaN stays NaN.
template <class A>
GSSF_INLINE typename Simd<A>::Vector exp_of(const typename Simd<A>::Vector& x) {
  using V = typename Simd<A>::Vector;
  using I = typename Simd<A>::Index;
  using E = ExpOf<A>;
  constexpr double inverse_factorial[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  const V shifted = x * A(1.44269504088896340736) + E::kRounder;
  const V n = shifted - E::kRounder;
  const V r = (x - n * E::kLn2High) - n * E::kLn2Low;
  V p = V{} + A(inverse_factorial[E::kDegree]);
  for (int k = E::kDegree; k-- > 0;) p = p * r + A(inverse_factorial[k]);
  const V power = (V)(((I)shifted + E::kBias) << E::kMantissa);  // 2^n
  return x < E::kLeast ? V{} : p * power;
}

// The lanes of v that `member` marks, as terms of the mean over a line whose maximum is best.
template <class A, bool kDistances>
GSSF_INLINE void add_terms(const typename Simd<A>::Vector& v, const typename Simd<A>::Vector& best,
                           const typename Simd<A>::Index& member, A beta, typename Simd<A>::Vector& sum,
                           typename Simd<A>::Index& count, typename Simd<A>::Index& ties) {
  using V = typename Simd<A>::Vector;
  using I = typename Simd<A>::Index;
  count -= member;
  if constexpr (kDistances) {
    const I tie = member & (v == best);
    ties -= tie;
    sum += (member & ~tie) ? best - v : V{};  // a tie of infinities is no distance
  } else {
    sum += member ? exp_of<A>((v - best) * beta) : V{};
  }
}

// Sums of the terms of s [n, m], whose maxima are `best`, over its scores that are not below `least` (above -inf, which
// marks what is no negative and so stays out). Terms are distances to the maxima if kDistances, else e^{-beta
// distance}.
template <class A, bool kDistances>
GSSF_INLINE void tile_terms(const A* s, int64_t n, int64_t m, const TileMaxima<A>& best, A least, A beta,
                            TileTerms<A>& out) {
  using V = typename Simd<A>::Vector;
  using I = typename Simd<A>::Index;
  using Lane = typename Simd<A>::Lane;
  constexpr int64_t L = Simd<A>::lanes;
  I lane;
  for (int64_t k = 0; k < L; ++k) lane[k] = static_cast<Lane>(k);

  const int64_t width = ceil_div(m, L) * L;
  std::fill_n(out.cols.sum.data(), width, A(0));
  std::fill_n(out.cols.count.data(), width, Lane(0));
  std::fill_n(out.cols.ties.data(), width, Lane(0));
  // By strips of rows, so that a column's sum is one of short sums, which rounds less than one long sum.
  constexpr int64_t kStrip = 16;
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t rows = std::min(kStrip, n - first);
    V row_sum[kStrip] = {};
    I row_count[kStrip] = {}, row_ties[kStrip] = {};
    for (int64_t j = 0; j < width; j += L) {
      const V col_best = load<V>(best.cols.score.data() + j);
      const I col_index = load<I>(best.cols.index.data() + j), here = lane + static_cast<Lane>(j);
      V col_sum{};
      I col_count{}, col_ties{};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        const V v = load<V>(s + i * kTileMost + j);
        const I close = ~(v < least);  // NaN is close to everything
        add_terms<A, kDistances>(v, V{} + best.rows.score[i], close & (here != best.rows.index[i]), beta, row_sum[r],
                                 row_count[r], row_ties[r]);
        add_terms<A, kDistances>(v, col_best, close & (col_index != static_cast<Lane>(i)), beta, col_sum, col_count,
                                 col_ties);
      }
      store(out.cols.sum.data() + j, load<V>(out.cols.sum.data() + j) + col_sum);
      store(out.cols.count.data() + j, load<I>(out.cols.count.data() + j) + col_count);
      store(out.cols.ties.data() + j, load<I>(out.cols.ties.data() + j) + col_ties);
    }
    for (int64_t r = 0; r < rows; ++r) {
      out.rows.sum[first + r] = sum_lanes(row_sum[r]);
      out.rows.count[first + r] = sum_lanes(row_count[r]);
      out.rows.ties[first + r] = sum_lanes(row_ties[r]);
    }
  }
}

#define GSSF_RELATIVE_KERNEL(A)                                                                                  \
  static void tile_terms_of(const A* s, int64_t n, int64_t m, const TileMaxima<A>& best, A least, const A* beta, \
                            TileTerms<A>& out) {                                                                 \
    if (beta) tile_terms<A, false>(s, n, m, best, least, *beta, out);                                            \
    else tile_terms<A, true>(s, n, m, best, least, A(0), out);                                                   \
  }
GSSF_RELATIVE_KERNEL(float)
GSSF_RELATIVE_KERNEL(double)
#undef GSSF_RELATIVE_KERNEL
