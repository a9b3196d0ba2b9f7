// The passes over a chunk of scores: statistics of rows and columns, and scores turned into their gradient.
// See isa.h and dense.cpp.

// The first `count` lanes of p; the rest are zero and belong to nobody.
template <class V, class A>
GSSF_INLINE V load_some(const A* p, int64_t count) {
  if (count >= Simd<A>::lanes) return load<V>(p);
  V v{};
  std::memcpy(&v, p, count * sizeof(A));
  return v;
}

template <class V, class A>
GSSF_INLINE void store_some(A* p, const V& v, int64_t count) {
  if (count >= Simd<A>::lanes) store(p, v);
  else std::memcpy(p, &v, count * sizeof(A));
}

template <class A>
GSSF_INLINE typename Simd<A>::Index lane_numbers() {
  typename Simd<A>::Index lane;
  for (int64_t k = 0; k < Simd<A>::lanes; ++k) lane[k] = static_cast<typename Simd<A>::Lane>(k);
  return lane;
}

// e^x where x may also be infinite, or far above 0 beside an infinity.
template <class A>
GSSF_INLINE typename Simd<A>::Vector exp_of_any(const typename Simd<A>::Vector& x) {
  using V = typename Simd<A>::Vector;
  return x > -ExpOf<A>::kLeast ? V{} + std::numeric_limits<A>::infinity() : exp_of<A>(x);
}

// Maxima of scale * s over the rows and columns of one tile, and Σ e^(scale * s - maximum).
template <class A>
GSSF_INLINE void logsumexp_tile(const A* s, int64_t ld, int64_t n, int64_t m, A scale, LogSums<A>& out) {
  using V = typename Simd<A>::Vector;
  constexpr int64_t L = Simd<A>::lanes;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const auto lane = lane_numbers<A>();
  const auto logits = [&](int64_t i, int64_t j) {
    const V v = scale * load_some<V>(s + i * ld + j, m - j);
    return m - j >= L ? v : lane < static_cast<typename Simd<A>::Lane>(m - j) ? v : V{} - kInf;
  };
  const auto shift = [](A max) { return std::isfinite(max) ? max : A(0); };
  // A NaN has no place among the maxima, but its sum must not be passed over where nothing else was seen.
  const auto seen = [](A max, A sum) { return sum != sum && max == -kInf ? kInf : max; };

  A row_max[kPassRows], col_shift[kPassCols];
  std::fill_n(out.col_max, kPassCols, -kInf);
  std::fill_n(out.col_sum, kPassCols, A(0));
  for (int64_t i = 0; i < n; ++i) {
    V best = V{} - kInf;
    for (int64_t j = 0; j < m; j += L) {
      const V v = logits(i, j), col = load<V>(out.col_max + j);
      best = v > best ? v : best;
      store(out.col_max + j, v > col ? v : col);
    }
    row_max[i] = best[0];
    for (int64_t k = 1; k < L; ++k) row_max[i] = std::max(row_max[i], best[k]);
  }
  for (int64_t j = 0; j < kPassCols; ++j) col_shift[j] = shift(out.col_max[j]);
  for (int64_t i = 0; i < n; ++i) {
    V sum{};
    const V row_shift = V{} + shift(row_max[i]);
    for (int64_t j = 0; j < m; j += L) {
      const V v = logits(i, j);
      sum += exp_of_any<A>(v - row_shift);
      store(out.col_sum + j, load<V>(out.col_sum + j) + exp_of_any<A>(v - load<V>(col_shift + j)));
    }
    out.row_sum[i] = sum_lanes(sum);
    out.row_max[i] = seen(row_max[i], out.row_sum[i]);
  }
  for (int64_t j = 0; j < m; ++j) out.col_max[j] = seen(out.col_max[j], out.col_sum[j]);
}

// s [n, m] becomes row_grad_i e^(t - row_max_i - row_log_i) + col_grad_j e^(t - col_max_j - col_log_j), t = scale * s.
// The maxima are taken off first: that difference is exact where it matters, and the logarithm is small.
// along [n] = the rows' Σ ds * s.
template <class A>
GSSF_INLINE void softmax_tile(A* s, int64_t ld, int64_t n, int64_t m, A scale, const Softmax<A>& rows,
                              const Softmax<A>& cols, A* along) {
  using V = typename Simd<A>::Vector;
  using Lane = typename Simd<A>::Lane;
  constexpr int64_t L = Simd<A>::lanes;
  const auto lane = lane_numbers<A>();
  for (int64_t i = 0; i < n; ++i) {
    A* row = s + i * ld;
    V sum{};
    for (int64_t j = 0; j < m; j += L) {
      const int64_t rest = m - j;
      const V score = load_some<V>(row + j, rest), t = scale * score;
      V ds{};
      if (rows.grad) ds = rows.grad[i] * exp_of<A>((t - rows.max[i]) - rows.log[i]);
      if (cols.grad) {
        const V p = exp_of<A>((t - load_some<V>(cols.max + j, rest)) - load_some<V>(cols.log + j, rest));
        ds += load_some<V>(cols.grad + j, rest) * p;
      }
      sum += rest >= L ? ds * score : lane < static_cast<Lane>(rest) ? ds * score : V{};
      store_some(row + j, ds, rest);
    }
    along[i] = sum_lanes(sum);
  }
}

// log(1 + e) for e in [0, 1], to an ulp or two: 2 artanh(z), z = e / (2 + e) <= 1/3, by its series.
template <class A>
GSSF_INLINE typename Simd<A>::Vector log1p_of(const typename Simd<A>::Vector& e) {
  using V = typename Simd<A>::Vector;
  constexpr int kTerms = sizeof(A) == 4 ? 8 : 17;
  const V z = e / (e + A(2)), square = z * z;
  V p = V{} + A(1) / A(2 * kTerms + 1);
  for (int k = kTerms; k-- > 0;) p = p * square + A(1) / A(2 * k + 1);
  return (z + z) * p;
}

// f(t), and its derivative into slope. NaN stays NaN.
template <Kind kKind, class A>
GSSF_INLINE typename Simd<A>::Vector pointwise(const typename Simd<A>::Vector& t, typename Simd<A>::Vector& slope) {
  using V = typename Simd<A>::Vector;
  const V zero{}, one = zero + A(1);
  if constexpr (kKind == Kind::hinge) {
    slope = t < zero ? zero : one;
    return t < zero ? zero : t;
  } else if constexpr (kKind == Kind::softplus) {
    const V e = exp_of<A>(t < zero ? t : -t), upper = one / (one + e);
    slope = t < zero ? e * upper : upper;
    return (t < zero ? zero : t) + log1p_of<A>(e);
  } else if constexpr (kKind == Kind::abs) {
    slope = t > zero ? one : t < zero ? -one : t;  // 0 at 0
    return t < zero ? -t : t;
  } else {
    slope = t + t;
    return t * t;
  }
}

template <Kind kKind, class A>
GSSF_INLINE void sum_tile(const SumTile<A>& tile, Sums<A>& out) {
  using V = typename Simd<A>::Vector;
  using I = typename Simd<A>::Index;
  using Lane = typename Simd<A>::Lane;
  constexpr int64_t L = Simd<A>::lanes;
  const auto lane = lane_numbers<A>();
  const auto first_lanes = [&](int64_t count) {
    return count >= L ? I{} - 1 : count <= 0 ? I{} : lane < static_cast<Lane>(count);
  };
  std::fill_n(out.col_sum, kPassCols, A(0));
  std::fill_n(out.col_slope, kPassCols, A(0));
  for (int64_t i = 0; i < tile.n; ++i) {
    A* row = tile.s + i * tile.ld;
    const A bias = tile.rows.bias ? tile.rows.bias[i] : A(0), weight = tile.rows.weight ? tile.rows.weight[i] : A(1);
    V sum{}, slopes{}, along{};
    for (int64_t j = 0; j < tile.m; j += L) {
      const int64_t rest = tile.m - j;
      const V score = load_some<V>(row + j, rest);
      I counted = first_lanes(rest), negated{};
      if (tile.positives != Positives::include) {
        const int64_t diagonal = i - tile.offset - j;
        I positive = lane == static_cast<Lane>(diagonal >= 0 && diagonal < L ? diagonal : -1);
        if (tile.rows.ids) {
          Lane equal[L] = {};  // and not lanes of `positive`, which would then be kept in memory
          for (int64_t k = 0; k < std::min(rest, L); ++k)
            equal[k] = tile.rows.ids[i] == tile.columns.ids[j + k] ? -1 : 0;
          positive |= load<I>(equal);
        }
        if (tile.positives == Positives::exclude) counted &= ~positive;
        else negated = positive;
      }
      const auto term = [&](const V& bias, const I& members, V& f, V& slope) {
        const V t = score * tile.scale + bias;
        f = pointwise<kKind, A>(negated ? -t : t, slope);
        slope = members ? (negated ? -slope : slope) : V{};
        f = members ? f : V{};
      };
      V f, slope;
      term(V{} + bias, counted, f, slope);
      sum += f;
      slopes += slope;
      V ds = slope * weight;
      if (j < tile.cols) {
        const int64_t some = tile.cols - j;
        term(tile.columns.bias ? load_some<V>(tile.columns.bias + j, some) : V{}, counted & first_lanes(some), f,
             slope);
        store(out.col_sum + j, load<V>(out.col_sum + j) + f);
        store(out.col_slope + j, load<V>(out.col_slope + j) + slope);
        ds += tile.columns.weight ? slope * load_some<V>(tile.columns.weight + j, some) : slope;
      }
      along += first_lanes(rest) ? ds * score : V{};
      if (tile.gradient) store_some(row + j, ds, rest);
    }
    out.row_sum[i] = sum_lanes(sum);
    out.row_slope[i] = sum_lanes(slopes);
    out.along[i] = sum_lanes(along);
  }
}

template <class A>
GSSF_INLINE void sum_tile_of_kind(Kind kind, const SumTile<A>& tile, Sums<A>& out) {
  if (kind == Kind::hinge) sum_tile<Kind::hinge, A>(tile, out);
  else if (kind == Kind::softplus) sum_tile<Kind::softplus, A>(tile, out);
  else if (kind == Kind::abs) sum_tile<Kind::abs, A>(tile, out);
  else sum_tile<Kind::square, A>(tile, out);
}

template <Kind kKind, class A>
GSSF_INLINE void relation_tile(const RelationTile<A>& tile, RelationSums<A>& out) {
  using V = typename Simd<A>::Vector;
  using I = typename Simd<A>::Index;
  using Lane = typename Simd<A>::Lane;
  constexpr int64_t L = Simd<A>::lanes;
  const auto lane = lane_numbers<A>();
  const V one = V{} + A(1), two = V{} + A(2);
  for (int64_t i = 0; i < tile.n; ++i) {
    const int64_t at = i * tile.ld;
    V student{}, teachers{}, along{};
    for (int64_t j = 0; j < tile.m; j += L) {
      const int64_t rest = std::min(tile.m - j, L), diagonal = i - tile.offset - j;
      const V u = load_some<V>(tile.u + at + j, rest), gap = load_some<V>(tile.w + at + j, rest) - u;
      const V e = (load_some<V>(tile.f + at + j, rest) - u) - tile.lam * gap;
      I counted = lane < static_cast<Lane>(rest);
      if (diagonal >= 0 && diagonal < L) counted &= lane != static_cast<Lane>(diagonal);
      const V times = lane < static_cast<Lane>(std::clamp<int64_t>(tile.once - j, 0, L)) ? one : two;
      V slope, ignored;
      const V loss = pointwise<kKind, A>(e, slope), between = pointwise<kKind, A>(gap, ignored);
      student += counted ? times * loss : V{};
      teachers += counted ? times * between : V{};
      along += counted ? times * slope * gap : V{};
      if (tile.gradient) store_some(tile.f + at + j, counted ? slope : V{}, rest);
    }
    out.student[i] = sum_lanes(student);
    out.teachers[i] = sum_lanes(teachers);
    out.along[i] = sum_lanes(along);
  }
}

#define GSSF_DENSE_KERNELS(A)                                                                             \
  static void logsumexp_tile_of(const A* s, int64_t ld, int64_t n, int64_t m, A scale, LogSums<A>& out) { \
    logsumexp_tile<A>(s, ld, n, m, scale, out);                                                           \
  }                                                                                                       \
  static void softmax_tile_of(A* s, int64_t ld, int64_t n, int64_t m, A scale, const Softmax<A>& rows,    \
                              const Softmax<A>& cols, A* along) {                                         \
    softmax_tile<A>(s, ld, n, m, scale, rows, cols, along);                                               \
  }                                                                                                       \
  static void relation_tile_of(const RelationTile<A>& tile, RelationSums<A>& out) {                       \
    if (tile.kind == Kind::abs) relation_tile<Kind::abs, A>(tile, out);                                   \
    else relation_tile<Kind::square, A>(tile, out);                                                       \
  }                                                                                                       \
  static void sum_tile_of(Kind kind, const SumTile<A>& tile, Sums<A>& out) { sum_tile_of_kind(kind, tile, out); }
GSSF_DENSE_KERNELS(float)
GSSF_DENSE_KERNELS(double)
#undef GSSF_DENSE_KERNELS
