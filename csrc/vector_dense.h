// The passes over a chunk of scores s: row and column statistics, and s overwritten with dscores. See isa.h and
// dense.cpp.

// p[0:count], at most a vector; the other lanes are zero.
template <class V, class A>
GSSF_INLINE V load_lanes(const A* p, int64_t count) {
  if (count >= Register<A>::lanes) return load<V>(p);
  V v{};
  std::memcpy(&v, p, count * sizeof(A));
  return v;
}

template <class V, class A>
GSSF_INLINE void store_lanes(A* p, const V& v, int64_t count) {
  if (count >= Register<A>::lanes) store(p, v);
  else std::memcpy(p, &v, count * sizeof(A));
}

template <class A>
GSSF_INLINE typename Register<A>::Index lane_numbers() {
  typename Register<A>::Index lane;
  for (int64_t k = 0; k < Register<A>::lanes; ++k) lane[k] = static_cast<typename Register<A>::Lane>(k);
  return lane;
}

// e^x, and +inf for x > -kLeast; x is positive only where the maximum is infinite.
template <class A>
GSSF_INLINE typename Register<A>::Vector exp_of_any(const typename Register<A>::Vector& x) {
  using V = typename Register<A>::Vector;
  return x > -ExpOf<A>::kLeast ? V{} + std::numeric_limits<A>::infinity() : exp_of<A>(x);
}

// t of scores, and dt/ds into slope; weights that depend on s are constant to autograd.
template <Score kScore, class A>
GSSF_INLINE typename Register<A>::Vector logit(const typename Register<A>::Vector& s,
                                               const typename Register<A>::Index& positive,
                                               const std::array<A, 3>& constants, typename Register<A>::Vector& slope) {
  using V = typename Register<A>::Vector;
  if constexpr (classes(kScore) == 1) {
    slope = V{} + constants[0];
    return constants[0] * s;
  } else if constexpr (kScore == Score::circle) {
    const auto [margin, scale, none] = constants;
    const V distance = positive ? (A(1) + margin) - s : s + margin;  // from the optimum; scale times it is the weight
    const V weight = scale * (distance < V{} ? V{} : distance);
    slope = positive ? -weight : weight;
    return slope * (s - (positive ? V{} + (A(1) - margin) : V{} + margin));
  } else {
    const auto [alpha, beta, base] = constants;
    slope = positive ? V{} - alpha : V{} + beta;
    return slope * (s - base);
  }
}

// For the scores of row i from column j on: which are positives, and which count for their row and for their column.
template <class A>
struct Members {
  typename Register<A>::Index positive, row, col;
};

template <Score kScore, class A>
GSSF_INLINE Members<A> members(const LogitTile<A>& tile, int64_t i, int64_t j, const typename Register<A>::Vector& s) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  const I lane = lane_numbers<A>();
  I inside = tile.m - j >= L ? I{} - 1 : lane < static_cast<Lane>(tile.m - j);
  if constexpr (kScore == Score::scaled) return {I{}, inside, inside};
  const int64_t diagonal = i - tile.offset - j;
  const I pair = lane == static_cast<Lane>(diagonal >= 0 && diagonal < L ? diagonal : -1);
  I positive{};
  if (tile.rows.labels) positive = load<I>(tile.cols.labels + j) == tile.rows.labels[i];
  I row = inside, col = inside;
  if constexpr (kScore == Score::limited) {
    positive |= pair;
    const auto counted = [&](const V& limit) { return inside & (positive | ~(s > limit)); };  // NaN counts
    if (tile.rows.upper) row = counted(V{} + tile.rows.upper[i]);
    if (tile.cols.upper) col = counted(load_lanes<V>(tile.cols.upper + j, tile.m - j));
    return {positive, row, col};
  }
  if (tile.leave_out) row = col = inside &= ~pair;
  const auto counted = [&](const V& upper, const V& lower) {  // NaN counts
    return inside & (positive ? ~(s >= upper) : ~(s <= lower));
  };
  if (tile.rows.upper) row = counted(V{} + tile.rows.upper[i], V{} + tile.rows.lower[i]);
  if (tile.cols.upper)
    col = counted(load_lanes<V>(tile.cols.upper + j, tile.m - j), load_lanes<V>(tile.cols.lower + j, tile.m - j));
  return {positive, row, col};
}

// Maxima of t over the rows and columns of one tile, by class, and Σ e^(t - maximum).
template <Score kScore, class A>
GSSF_INLINE void logsumexp_tile(const LogitTile<A>& tile, LogSums<A, classes(kScore)>& out) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  constexpr int64_t L = Register<A>::lanes;
  constexpr int C = classes(kScore);
  constexpr bool kAll = kScore == Score::scaled;  // every score counts
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const int64_t n = tile.n, m = tile.m;
  const auto shift = [](A max) { return std::isfinite(max) ? max : A(0); };
  // The maxima ignore NaN; a tile with nothing but NaN gets +inf, so that merging does not skip its sum.
  const auto with_nan = [](A max, A sum) { return sum != sum && max == -kInf ? kInf : max; };
  const auto of_class = [](int c, const Members<A>& member, const I& counts) {
    return C == 1 ? counts : counts & (c == 0 ? member.positive : ~member.positive);
  };

  A row_max[C][kPassRows], col_shift[C][kPassCols];
  std::fill_n(out.col_max[0], C * kPassCols, -kInf);
  std::fill_n(out.col_sum[0], C * kPassCols, A(0));
  for (int64_t i = 0; i < n; ++i) {
    V maximum[C];
    for (int c = 0; c < C; ++c) maximum[c] = V{} - kInf;
    for (int64_t j = 0; j < m; j += L) {
      const V s = load_lanes<V>(tile.s + i * tile.ld + j, m - j);
      const Members<A> member = members<kScore, A>(tile, i, j, s);
      V slope;
      const V t = logit<kScore, A>(s, member.positive, tile.constants, slope);
      for (int c = 0; c < C; ++c) {
        const V v = kAll && m - j >= L ? t : of_class(c, member, member.row) ? t : V{} - kInf;
        maximum[c] = v > maximum[c] ? v : maximum[c];
        if (tile.columns) {
          const V w = kAll ? v : of_class(c, member, member.col) ? t : V{} - kInf;
          const V col = load<V>(out.col_max[c] + j);
          store(out.col_max[c] + j, w > col ? w : col);
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      row_max[c][i] = maximum[c][0];
      for (int64_t k = 1; k < L; ++k) row_max[c][i] = std::max(row_max[c][i], maximum[c][k]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int64_t j = 0; j < kPassCols; ++j) col_shift[c][j] = shift(out.col_max[c][j]);
  for (int64_t i = 0; i < n; ++i) {
    V sum[C]{}, row_shift[C];
    for (int c = 0; c < C; ++c) row_shift[c] = V{} + shift(row_max[c][i]);
    for (int64_t j = 0; j < m; j += L) {
      const V s = load_lanes<V>(tile.s + i * tile.ld + j, m - j);
      const Members<A> member = members<kScore, A>(tile, i, j, s);
      V slope;
      const V t = logit<kScore, A>(s, member.positive, tile.constants, slope);
      const auto by_class = [&](const V* of) { return C == 1 ? of[0] : member.positive ? of[0] : of[C - 1]; };
      const auto add = [&](const I& counts, const V& e, const auto& to) {
        for (int c = 0; c < C; ++c) to(c, kAll && m - j >= L ? e : of_class(c, member, counts) ? e : V{});
      };
      add(member.row, exp_of_any<A>(t - by_class(row_shift)), [&](int c, const V& e) { sum[c] += e; });
      if (tile.columns) {
        V shifts[C];
        for (int c = 0; c < C; ++c) shifts[c] = load<V>(col_shift[c] + j);
        add(member.col, exp_of_any<A>(t - by_class(shifts)),
            [&](int c, const V& e) { store(out.col_sum[c] + j, load<V>(out.col_sum[c] + j) + e); });
      }
    }
    for (int c = 0; c < C; ++c) {
      out.row_sum[c][i] = sum_lanes(sum[c]);
      out.row_max[c][i] = with_nan(row_max[c][i], out.row_sum[c][i]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int64_t j = 0; j < m; ++j) out.col_max[c][j] = with_nan(out.col_max[c][j], out.col_sum[c][j]);
}

// s [n, m] becomes dL/dt = row_grad_i e^(t - row_max_i - row_log_i) + col_grad_j e^(t - col_max_j - col_log_j), each
// with the statistics of the score's class, and by label dL/ds = dL/dt dt/ds. The maxima are subtracted first: that
// difference is exact where e^… is not small, and the logarithm is small. products [n] = Σ of it times s per row.
template <Score kScore, class A>
GSSF_INLINE void softmax_tile(const LogitTile<A>& tile, const Softmax<A>& rows, const Softmax<A>& cols, A* products) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  constexpr int C = classes(kScore);
  const auto lane = lane_numbers<A>();
  for (int64_t i = 0; i < tile.n; ++i) {
    A* row = tile.s + i * tile.ld;
    V sum{};
    for (int64_t j = 0; j < tile.m; j += L) {
      const int64_t rest = tile.m - j;
      const V score = load_lanes<V>(row + j, rest);
      const Members<A> member = members<kScore, A>(tile, i, j, score);
      V slope, ds{};
      const V t = logit<kScore, A>(score, member.positive, tile.constants, slope);
      struct Statistics {
        V max, log, grad;
      };
      const auto share = [&](const I& counts, const auto& of) {  // of(c): those of class c
        Statistics x = of(0);
        if constexpr (C == 2) {
          const Statistics y = of(1);
          x.max = member.positive ? x.max : y.max;
          x.log = member.positive ? x.log : y.log;
          x.grad = member.positive ? x.grad : y.grad;
        }
        const V p = x.grad * exp_of<A>((t - x.max) - x.log);
        return kScore == Score::scaled ? p : counts ? p : V{};
      };
      if (rows.grad)
        ds = share(member.row, [&](int c) {
          const int64_t at = c * rows.step + i;
          return Statistics{V{} + rows.max[at], V{} + rows.log[at], V{} + rows.grad[c * rows.grad_step + i]};
        });
      if (cols.grad)
        ds += share(member.col, [&](int c) {
          const int64_t at = c * cols.step + j;
          return Statistics{load_lanes<V>(cols.max + at, rest), load_lanes<V>(cols.log + at, rest),
                            load_lanes<V>(cols.grad + c * cols.grad_step + j, rest)};
        });
      if constexpr (C == 2) ds *= slope;
      sum += rest >= L ? ds * score : lane < static_cast<Lane>(rest) ? ds * score : V{};
      store_lanes(row + j, ds, rest);
    }
    products[i] = sum_lanes(sum);
  }
}

// log(1 + e) for e in [0, 1], to an ulp or two: 2 artanh(z), z = e / (2 + e) <= 1/3, by its series.
template <class A>
GSSF_INLINE typename Register<A>::Vector log1p_of(const typename Register<A>::Vector& e) {
  using V = typename Register<A>::Vector;
  constexpr int kTerms = sizeof(A) == 4 ? 8 : 17;
  const V z = e / (e + A(2)), square = z * z;
  V p = V{} + A(1) / A(2 * kTerms + 1);
  for (int k = kTerms; k-- > 0;) p = p * square + A(1) / A(2 * k + 1);
  return (z + z) * p;
}

// f(t), and its derivative into slope. NaN stays NaN.
template <Kind kKind, class A>
GSSF_INLINE typename Register<A>::Vector pointwise(const typename Register<A>::Vector& t,
                                                   typename Register<A>::Vector& slope) {
  using V = typename Register<A>::Vector;
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
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  const auto lane = lane_numbers<A>();
  const auto first_lanes = [&](int64_t count) {
    return count >= L ? I{} - 1 : count <= 0 ? I{} : lane < static_cast<Lane>(count);
  };
  std::fill_n(out.col_sum, kPassCols, A(0));
  std::fill_n(out.col_slope, kPassCols, A(0));
  for (int64_t i = 0; i < tile.n; ++i) {
    A* row = tile.s + i * tile.ld;
    const A bias = tile.rows.bias ? tile.rows.bias[i] : A(0), weight = tile.rows.weight ? tile.rows.weight[i] : A(1);
    V sum{}, slopes{}, dscores_dot_s{};
    for (int64_t j = 0; j < tile.m; j += L) {
      const int64_t rest = tile.m - j;
      const V score = load_lanes<V>(row + j, rest);
      I counted = first_lanes(rest), negated{};
      if (tile.positives != Positives::include) {
        const int64_t diagonal = i - tile.offset - j;
        I positive = lane == static_cast<Lane>(diagonal >= 0 && diagonal < L ? diagonal : -1);
        if (tile.rows.ids) {
          Lane equal[L] = {};  // not lanes of `positive`, which would then live in memory
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
        const int64_t anchors = tile.cols - j;  // columns from j on that have a term
        term(tile.columns.bias ? load_lanes<V>(tile.columns.bias + j, anchors) : V{}, counted & first_lanes(anchors), f,
             slope);
        store(out.col_sum + j, load<V>(out.col_sum + j) + f);
        store(out.col_slope + j, load<V>(out.col_slope + j) + slope);
        ds += tile.columns.weight ? slope * load_lanes<V>(tile.columns.weight + j, anchors) : slope;
      }
      dscores_dot_s += first_lanes(rest) ? ds * score : V{};
      if (tile.gradient) store_lanes(row + j, ds, rest);
    }
    out.row_sum[i] = sum_lanes(sum);
    out.row_slope[i] = sum_lanes(slopes);
    out.dscores_dot_s[i] = sum_lanes(dscores_dot_s);
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
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  const auto lane = lane_numbers<A>();
  const V one = V{} + A(1), two = V{} + A(2);
  for (int64_t i = 0; i < tile.n; ++i) {
    const int64_t at = i * tile.ld;
    V student{}, teachers{}, slope_dot_gap{};
    for (int64_t j = 0; j < tile.m; j += L) {
      const int64_t rest = std::min(tile.m - j, L), diagonal = i - tile.offset - j;
      const V u = load_lanes<V>(tile.u + at + j, rest), gap = load_lanes<V>(tile.w + at + j, rest) - u;
      const V e = (load_lanes<V>(tile.f + at + j, rest) - u) - tile.lam * gap;
      I counted = lane < static_cast<Lane>(rest);
      if (diagonal >= 0 && diagonal < L) counted &= lane != static_cast<Lane>(diagonal);
      const V times = lane < static_cast<Lane>(std::clamp<int64_t>(tile.once - j, 0, L)) ? one : two;
      V slope, ignored;
      const V loss = pointwise<kKind, A>(e, slope), between = pointwise<kKind, A>(gap, ignored);
      student += counted ? times * loss : V{};
      teachers += counted ? times * between : V{};
      slope_dot_gap += counted ? times * slope * gap : V{};
      if (tile.gradient) store_lanes(tile.f + at + j, counted ? slope : V{}, rest);
    }
    out.student[i] = sum_lanes(student);
    out.teachers[i] = sum_lanes(teachers);
    out.slope_dot_gap[i] = sum_lanes(slope_dot_gap);
  }
}

#define GSSF_SCORE_KERNELS(A, name)                                                                    \
  static void logsumexp_tile_of(ScoreTag<Score::name>, const LogitTile<A>& tile,                       \
                                LogSums<A, classes(Score::name)>& out) {                               \
    logsumexp_tile<Score::name, A>(tile, out);                                                         \
  }                                                                                                    \
  static void softmax_tile_of(ScoreTag<Score::name>, const LogitTile<A>& tile, const Softmax<A>& rows, \
                              const Softmax<A>& cols, A* products) {                                   \
    softmax_tile<Score::name, A>(tile, rows, cols, products);                                          \
  }
#define GSSF_FLOAT_KERNELS(name) GSSF_SCORE_KERNELS(float, name)
#define GSSF_DOUBLE_KERNELS(name) GSSF_SCORE_KERNELS(double, name)
GSSF_SCORES(GSSF_FLOAT_KERNELS)
GSSF_SCORES(GSSF_DOUBLE_KERNELS)
#undef GSSF_FLOAT_KERNELS
#undef GSSF_DOUBLE_KERNELS
#undef GSSF_SCORE_KERNELS

#define GSSF_DENSE_KERNELS(A)                                                       \
  static void relation_tile_of(const RelationTile<A>& tile, RelationSums<A>& out) { \
    if (tile.kind == Kind::abs) relation_tile<Kind::abs, A>(tile, out);             \
    else relation_tile<Kind::square, A>(tile, out);                                 \
  }                                                                                 \
  static void sum_tile_of(Kind kind, const SumTile<A>& tile, Sums<A>& out) { sum_tile_of_kind(kind, tile, out); }
GSSF_DENSE_KERNELS(float)
GSSF_DENSE_KERNELS(double)
#undef GSSF_DENSE_KERNELS
