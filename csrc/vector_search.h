// What search and ranks ask of a tile of scores, besides vector_certified.h. See isa.h.

// Sets scores of s [n, m] that are greater than the limit of their row to -inf. NaN stays.
template <class A>
GSSF_INLINE void limit_rows(A* s, int64_t n, int64_t m, const A* most) {
  using V = typename Register<A>::Vector;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += Register<A>::lanes) {
      A* at = s + i * kTileMost + j;
      const V v = load<V>(at);
      store(at, v > V{} + most[i] ? V{} - std::numeric_limits<A>::infinity() : v);
    }
}

// NaN becomes +inf: a score that is ahead of every level.
template <class A>
GSSF_INLINE void nan_ahead(A* s, int64_t n, int64_t m) {
  using V = typename Register<A>::Vector;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += Register<A>::lanes) {
      A* at = s + i * kTileMost + j;
      const V v = load<V>(at);
      store(at, v == v ? v : V{} + std::numeric_limits<A>::infinity());
    }
}

// How many of s [m] are greater than a level, and how many reach it; NaN does neither, and is behind the last score up
// to a whole vector.
template <class A>
GSSF_INLINE void count_level(const A* s, int64_t m, A level, int64_t& greater, int64_t& reaching) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  I over{}, equal{};
  for (int64_t j = 0; j < m; j += Register<A>::lanes) {
    const V v = load<V>(s + j);
    over -= v > V{} + level;
    equal -= v == V{} + level;
  }
  const int64_t count = sum_lanes(over);
  greater += count, reaching += count + sum_lanes(equal);
}

// The same for every level of an anchor, ascending; score j is s[j * step]. bins [2, levels + 1] is scratch.
template <class A>
GSSF_INLINE void count_levels(const A* s, int64_t m, int64_t step, const A* levels, int64_t count, int64_t* bins,
                              int64_t* greater, int64_t* reaching) {
  int64_t *const over = bins, *const up_to = bins + count + 1;  // how many levels a score exceeds; that it reaches
  std::fill_n(bins, 2 * (count + 1), int64_t(0));
  for (int64_t j = 0; j < m; ++j) {
    const A v = s[j * step];
    if (!(v >= levels[0])) continue;
    const A* first = std::lower_bound(levels, levels + count, v);
    const A* last = first;
    while (last < levels + count && *last == v) ++last;
    ++over[first - levels], ++up_to[last - levels];
  }
  for (int64_t l = count, sum = 0, sum_up_to = 0; l-- > 0;) {
    greater[l] += sum += over[l + 1];
    reaching[l] += sum_up_to += up_to[l + 1];
  }
}

// Up to so many levels a row is read once for each, by vectors, rather than searching for every score's place.
constexpr int64_t kFewLevels = 8;

// Counts for rows: those of row i have the levels starts[i] .. starts[i + 1].
template <class A>
GSSF_INLINE void count_rows(const A* s, int64_t n, int64_t m, const A* levels, const int64_t* starts, int64_t* bins,
                            int64_t* greater, int64_t* reaching) {
  for (int64_t i = 0; i < n; ++i) {
    const A* row = s + i * kTileMost;
    const int64_t first = starts[i], count = starts[i + 1] - first;
    if (count > kFewLevels) {
      count_levels(row, m, 1, levels + first, count, bins, greater + first, reaching + first);
    } else {
      for (int64_t l = first; l < first + count; ++l) count_level(row, m, levels[l], greater[l], reaching[l]);
    }
  }
}

// Counts for columns with one level each: level [m], greater and reaching [m] are padded to whole vectors.
template <class A>
GSSF_INLINE void count_columns(const A* s, int64_t n, int64_t m, const A* level, typename Simd<A>::Lane* greater,
                               typename Simd<A>::Lane* reaching) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += Register<A>::lanes) {
      const V v = load<V>(s + i * kTileMost + j), least = load<V>(level + j);
      store(greater + j, load<I>(greater + j) - (v > least));
      store(reaching + j, load<I>(reaching + j) - (v >= least));
    }
}

#define GSSF_SEARCH_KERNELS(A)                                                                                       \
  static void limit_rows_of(A* s, int64_t n, int64_t m, const A* most) { limit_rows(s, n, m, most); }                \
  static void nan_ahead_of(A* s, int64_t n, int64_t m) { nan_ahead(s, n, m); }                                       \
  static void count_rows_of(const A* s, int64_t n, int64_t m, const A* levels, const int64_t* starts, int64_t* bins, \
                            int64_t* greater, int64_t* reaching) {                                                   \
    count_rows(s, n, m, levels, starts, bins, greater, reaching);                                                    \
  }                                                                                                                  \
  static void count_column_levels_of(const A* s, int64_t n, int64_t m, const A* levels, const int64_t* starts,       \
                                     int64_t* bins, int64_t* greater, int64_t* reaching) {                           \
    for (int64_t j = 0; j < m; ++j) {                                                                                \
      const int64_t first = starts[j], count = starts[j + 1] - first;                                                \
      if (count > 0)                                                                                                 \
        count_levels(s + j, n, kTileMost, levels + first, count, bins, greater + first, reaching + first);           \
    }                                                                                                                \
  }                                                                                                                  \
  static void count_columns_of(const A* s, int64_t n, int64_t m, const A* level, Simd<A>::Lane* greater,             \
                               Simd<A>::Lane* reaching) {                                                            \
    count_columns(s, n, m, level, greater, reaching);                                                                \
  }
GSSF_SEARCH_KERNELS(float)
GSSF_SEARCH_KERNELS(double)
#undef GSSF_SEARCH_KERNELS
