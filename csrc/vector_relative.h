// Sums of one tile for the relative negatives. See isa.h.

// Adds the lanes of v that `member` marks to the sums of an anchor whose maximum is `maximum`.
template <class A, bool kDistances>
GSSF_INLINE void add_terms(const typename Register<A>::Vector& v, const typename Register<A>::Vector& maximum,
                           const typename Register<A>::Index& member, A beta, typename Register<A>::Vector& sum,
                           typename Register<A>::Index& count, typename Register<A>::Index& ties) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  count -= member;
  if constexpr (kDistances) {
    const I tie = member & (v == maximum);
    ties -= tie;
    sum += (member & ~tie) ? maximum - v : V{};  // inf - inf is no distance
  } else {
    sum += member ? exp_of<A>((v - maximum) * beta) : V{};
  }
}

// Sums of the terms of s [n, m], whose maxima are `maxima`, over the scores that are not below `least`, which is above
// -inf, the mark of scores of no negative, nor above the limit of the row or column. Terms are distances to the maxima
// if kDistances, else e^{-beta distance}. Without kColumns only those of rows are computed.
template <class A, bool kDistances, bool kColumns, bool kLimits>
GSSF_INLINE void tile_terms(const A* s, int64_t n, int64_t m, const TileMaxima<A>& maxima, A least, A beta,
                            const Limits<A>& limits, TileTerms<A>& out) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  I lane;
  for (int64_t k = 0; k < L; ++k) lane[k] = static_cast<Lane>(k);

  const int64_t width = ceil_div(m, L) * L;
  std::fill_n(out.cols.sum.data(), width, A(0));
  std::fill_n(out.cols.count.data(), width, Lane(0));
  std::fill_n(out.cols.ties.data(), width, Lane(0));
  // In strips of rows: a column's sum is a sum of short sums, which rounds less than one long sum.
  constexpr int64_t kStrip = 16;
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t rows = std::min(kStrip, n - first);
    V row_sum[kStrip] = {};
    I row_count[kStrip] = {}, row_ties[kStrip] = {};
    for (int64_t j = 0; j < width; j += L) {
      const I here = lane + static_cast<Lane>(j);
      V col_maximum{};
      I col_index{};
      if constexpr (kColumns) {
        col_maximum = load<V>(maxima.cols.score.data() + j);
        col_index = load<I>(maxima.cols.index.data() + j);
      }
      const auto within = [&](const V& v, const V& limit) { return kLimits ? ~(v > limit) : I{} - 1; };
      V col_sum{};
      I col_count{}, col_ties{};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        const V v = load<V>(s + i * kTileMost + j);
        const I close = ~(v < least);  // NaN is close to everything
        const I row_close = kLimits && limits.rows ? close & within(v, V{} + limits.rows[i]) : close;
        add_terms<A, kDistances>(v, V{} + maxima.rows.score[i], row_close & (here != maxima.rows.index[i]), beta,
                                 row_sum[r], row_count[r], row_ties[r]);
        if constexpr (kColumns) {
          const I col_close = kLimits && limits.cols ? close & within(v, load<V>(limits.cols + j)) : close;
          add_terms<A, kDistances>(v, col_maximum, col_close & (col_index != static_cast<Lane>(i)), beta, col_sum,
                                   col_count, col_ties);
        }
      }
      if constexpr (!kColumns) continue;
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

template <class A, bool kDistances>
GSSF_INLINE void terms_of_kind(const A* s, int64_t n, int64_t m, const TileMaxima<A>& maxima, A least, A beta,
                               const Limits<A>& limits, bool columns, TileTerms<A>& out) {
  const bool limited = limits.rows || limits.cols;
  if (columns && !limited) tile_terms<A, kDistances, true, false>(s, n, m, maxima, least, beta, limits, out);
  else if (columns) tile_terms<A, kDistances, true, true>(s, n, m, maxima, least, beta, limits, out);
  else tile_terms<A, kDistances, false, true>(s, n, m, maxima, least, beta, limits, out);
}

#define GSSF_RELATIVE_KERNEL(A)                                                                                    \
  static void tile_terms_of(const A* s, int64_t n, int64_t m, const TileMaxima<A>& maxima, A least, const A* beta, \
                            const Limits<A>& limits, bool columns, TileTerms<A>& out) {                            \
    if (beta) terms_of_kind<A, false>(s, n, m, maxima, least, *beta, limits, columns, out);                        \
    else terms_of_kind<A, true>(s, n, m, maxima, least, A(0), limits, columns, out);                               \
  }
GSSF_RELATIVE_KERNEL(float)
GSSF_RELATIVE_KERNEL(double)
#undef GSSF_RELATIVE_KERNEL
