// The maxima of one tile of scores. See isa.h.

// Whether candidate v replaces the maximum m: it is greater, or it is the first NaN, which nothing replaces.
template <class T>
GSSF_INLINE auto displaces(const T& v, const T& m) {
  return (v > m) | ((v != v) & (m == m));
}

// Row and column maxima of s [n, m]; without kColumns those of rows alone. Unless col_id is null, scores of equal
// row_id and col_id first become -inf. Scores above the limit of their row, or of their column, do not count for it.
// The padding behind each row, up to a whole vector, must hold -inf. Ties keep the lowest index.
template <class A, bool kColumns, bool kLimits>
GSSF_INLINE void tile_maxima(A* s, int64_t n, int64_t m, const typename Register<A>::Lane* row_id,
                             const typename Register<A>::Lane* col_id, const Limits<A>& limits, TileMaxima<A>& out) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const V none = V{} + kNone;
  I lane;
  for (int64_t k = 0; k < L; ++k) lane[k] = static_cast<Lane>(k);

  const int64_t width = ceil_div(m, L) * L;
  if constexpr (kColumns) {
    std::fill_n(out.cols.score.data(), width, kNone);
    std::fill_n(out.cols.index.data(), width, Lane(-1));
  }
  for (int64_t i = 0; i < n; ++i) {
    V maximum = none;
    I place = I{} - 1;
    for (int64_t j = 0; j < width; j += L) {
      V v = load<V>(s + i * kTileMost + j);
      if (col_id) {
        v = load<I>(col_id + j) == I{} + row_id[i] ? none : v;
        store(s + i * kTileMost + j, v);
      }
      if constexpr (kColumns) {
        const V counted = kLimits && limits.cols ? (v > load<V>(limits.cols + j) ? none : v) : v;
        const V col = load<V>(out.cols.score.data() + j);
        const I col_place = load<I>(out.cols.index.data() + j);
        const I wins_col = displaces(counted, col);
        store(out.cols.score.data() + j, wins_col ? counted : col);
        store(out.cols.index.data() + j, wins_col ? I{} + static_cast<Lane>(i) : col_place);
      }
      if (kLimits && limits.rows) v = v > V{} + limits.rows[i] ? none : v;
      const I wins_row = displaces(v, maximum);
      maximum = wins_row ? v : maximum;
      place = wins_row ? lane + static_cast<Lane>(j) : place;
    }
    A score = maximum[0];
    Lane index = place[0];
    for (int64_t k = 1; k < L; ++k) {
      const bool tie = (maximum[k] == score || (maximum[k] != maximum[k] && score != score)) && place[k] < index;
      if (displaces<A>(maximum[k], score) || (tie && place[k] >= 0)) score = maximum[k], index = place[k];
    }
    out.rows.score[i] = score;
    out.rows.index[i] = index;
  }
}

#define GSSF_MAXIMA_KERNEL(A)                                                                                      \
  static void tile_maxima_of(A* s, int64_t n, int64_t m, const Simd<A>::Lane* row_id, const Simd<A>::Lane* col_id, \
                             const Limits<A>& limits, bool columns, TileMaxima<A>& out) {                          \
    const bool limited = limits.rows || limits.cols;                                                               \
    if (columns && !limited) tile_maxima<A, true, false>(s, n, m, row_id, col_id, limits, out);                    \
    else if (columns) tile_maxima<A, true, true>(s, n, m, row_id, col_id, limits, out);                            \
    else tile_maxima<A, false, true>(s, n, m, row_id, col_id, limits, out);                                        \
  }
GSSF_MAXIMA_KERNEL(float)
GSSF_MAXIMA_KERNEL(double)
#undef GSSF_MAXIMA_KERNEL
