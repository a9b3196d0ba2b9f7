// Rounding to bf16 with its errors, and the scores of a tile that may still be an anchor's maximum. See isa.h,
// certified.h.

// out [n] = x rounded to bf16, ties to even, subnormals to zero; zeros behind them up to `padded`. squares = {Σ x², Σ
// (x - out)²}, in fp32. bf16 is copied, and its squares are not written.
template <class T>
GSSF_INLINE void round_row(const T* x, int64_t n, int64_t padded, uint16_t* out, float* squares) {
  using V = Simd<float>::Vector;
  using I = Simd<float>::Index;
  typedef uint16_t Narrow __attribute__((vector_size(32)));
  constexpr int64_t L = Simd<float>::lanes;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    std::memcpy(out, x, n * sizeof(uint16_t));
    std::fill(out + n, out + padded, uint16_t(0));
  } else {
    V square_sum{}, error_sum{};
    for (int64_t k = 0; k < padded; k += L) {
      V v{};
      if (k + L <= n) convert(reinterpret_cast<float*>(&v), x + k, L);
      else if (k < n) convert(reinterpret_cast<float*>(&v), x + k, n - k);
      const I bits = (I)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
      const I normal = (rounded & 0x7f800000) == 0 ? I{} : rounded;
      const V error = v - (V)normal;
      square_sum += v * v;
      error_sum += error * error;
      store(out + k, __builtin_convertvector((normal >> 16) & 0xffff, Narrow));
    }
    squares[0] = sum_lanes(square_sum);
    squares[1] = sum_lanes(error_sum);
  }
}

// x · y in fp64, where products of fp32 numbers are exact. Channel c is added to sum c mod 32, and those are folded in
// halves: the same bits by every instruction set, and by triton/certified.py. Meanwhile the rows that come next are
// fetched, which lie anywhere.
template <class T>
GSSF_INLINE double exact_dot(const T* x, const T* y, int64_t n, const T* next_x, const T* next_y) {
  using V = Simd<double>::Vector;
  typedef float Narrow __attribute__((vector_size(32)));
  constexpr int64_t L = Simd<double>::lanes, kStep = 4 * L;
  const auto wide = [](const T* p) {
    Narrow v;
    convert(reinterpret_cast<float*>(&v), p, L);
    return __builtin_convertvector(v, V);
  };
  V sum[4] = {};
  const auto add = [&](const T* p, const T* q) {
    for (int64_t r = 0; r < 4; ++r) sum[r] += wide(p + r * L) * wide(q + r * L);
  };
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    for (int64_t at = k; at < k + kStep; at += 64 / int64_t(sizeof(T)))  // one per cache line
      __builtin_prefetch(next_x + at), __builtin_prefetch(next_y + at);
    add(x + k, y + k);
  }
  if (k < n) {
    T last_x[kStep] = {}, last_y[kStep] = {};
    std::copy(x + k, x + n, last_x), std::copy(y + k, y + n, last_y);
    add(last_x, last_y);
  }
  V total = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  for (int64_t step = L / 2; step > 0; step /= 2)
    for (int64_t l = 0; l < step; ++l) total[l] += total[l + step];
  return total[0];
}

// Sets the scores of s [n, m] with equal ids to `value`.
template <class A>
GSSF_INLINE void mask_ids(A* s, int64_t n, int64_t m, const typename Simd<A>::Lane* row_id,
                          const typename Simd<A>::Lane* col_id, A value) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += Register<A>::lanes) {
      A* at = s + i * kTileMost + j;
      store(at, load<I>(col_id + j) == I{} + row_id[i] ? V{} + value : load<V>(at));
    }
}

// Maxima of the rows and columns of s [n, m], without NaN; the padding behind each row up to a whole vector is -inf.
// With kLimits a row has only scores up to row_most[i], and a column up to col_most[j].
template <bool kLimits>
GSSF_INLINE void tile_tops(const float* s, int64_t n, int64_t m, const float* row_most, const float* col_most,
                           float* row, float* col) {
  using V = Simd<float>::Vector;
  constexpr int64_t L = Simd<float>::lanes;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const V none = V{} + kNone;
  std::fill_n(col, ceil_div(m, L) * L, kNone);
  for (int64_t i = 0; i < n; ++i) {
    V maximum = V{} + kNone;
    for (int64_t j = 0; j < m; j += L) {
      const V v = load<V>(s + i * kTileMost + j), c = load<V>(col + j);
      const V in_row = kLimits ? (v > V{} + row_most[i] ? none : v) : v;
      const V in_col = kLimits ? (v > load<V>(col_most + j) ? none : v) : v;
      maximum = in_row > maximum ? in_row : maximum;
      store(col + j, in_col > c ? in_col : c);
    }
    float top = maximum[0];
    for (int64_t l = 1; l < L; ++l) top = std::max(top, maximum[l]);
    row[i] = top;
  }
}

static void tile_tops_of(const float* s, int64_t n, int64_t m, const float* row_most, const float* col_most, float* row,
                         float* col) {
  if (row_most) tile_tops<true>(s, n, m, row_most, col_most, row, col);
  else tile_tops<false>(s, n, m, row_most, col_most, row, col);
}

// What makes a score of a tile a candidate: that it is not below the least of its row, or of its column, as no NaN is;
// and with limits that it does not exceed the most. Behind the last column col_least is +inf. Without columns it is
// null.
template <class A>
struct Reach {
  const A *row_least, *col_least;
  const A *row_most = nullptr, *col_most = nullptr;
};

// Writes the places i * kTileMost + j of the candidates of s [n, m], and returns their number; `places` can hold all.
template <class A, bool kColumns, bool kLimits>
GSSF_INLINE int64_t reaching(const A* s, int64_t n, int64_t m, const Reach<A>& reach, int32_t* places) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  constexpr int64_t L = Register<A>::lanes, kStep = Simd<A>::lanes;
  const auto any = [](const I& mask) {
    int64_t word[sizeof(I) / 8], all = 0;
    std::memcpy(word, &mask, sizeof(mask));
    for (const int64_t w : word) all |= w;
    return all != 0;
  };
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const V least = V{} + reach.row_least[i];
    const auto hits = [&](int64_t j) {
      const V v = load<V>(s + i * kTileMost + j);
      I hit = ~(v < least);
      if constexpr (kLimits) hit &= v <= V{} + reach.row_most[i];
      if constexpr (kColumns) {
        I in_col = ~(v < load<V>(reach.col_least + j));
        if constexpr (kLimits) in_col &= v <= load<V>(reach.col_most + j);
        hit |= in_col;
      }
      return hit;
    };
    I seen{};
    for (int64_t j = 0; j < m; j += kStep)
      for (int64_t part = 0; part < kStep; part += L) seen |= hits(j + part);
    if (!any(seen)) continue;
    for (int64_t j = 0; j < m; j += L) {
      const I hit = hits(j);
      if (!any(hit)) continue;
      for (int64_t l = 0; l < L; ++l)
        if (hit[l]) places[count++] = static_cast<int32_t>(i * kTileMost + j + l);
    }
  }
  return count;
}

#define GSSF_REACHING_KERNELS(A)                                                                                \
  static void mask_ids_of(A* s, int64_t n, int64_t m, const Simd<A>::Lane* row_id, const Simd<A>::Lane* col_id, \
                          A value) {                                                                            \
    mask_ids(s, n, m, row_id, col_id, value);                                                                   \
  }                                                                                                             \
  static int64_t reaching_of(const A* s, int64_t n, int64_t m, const A* row_least, const A* col_least,          \
                             const A* row_most, const A* col_most, int32_t* places) {                           \
    const Reach<A> reach{row_least, col_least, row_most, col_most};                                             \
    if (!col_least) return reaching<A, false, false>(s, n, m, reach, places);                                   \
    return row_most ? reaching<A, true, true>(s, n, m, reach, places)                                           \
                    : reaching<A, true, false>(s, n, m, reach, places);                                         \
  }
GSSF_REACHING_KERNELS(float)
GSSF_REACHING_KERNELS(double)
#undef GSSF_REACHING_KERNELS

#define GSSF_CERTIFIED_KERNELS(T)                                                                   \
  static void round_row_of(const T* x, int64_t n, int64_t padded, uint16_t* out, float* squares) {  \
    round_row(x, n, padded, out, squares);                                                          \
  }                                                                                                 \
  static double exact_dot_of(const T* x, const T* y, int64_t n, const T* next_x, const T* next_y) { \
    return exact_dot(x, y, n, next_x, next_y);                                                      \
  }
GSSF_CERTIFIED_KERNELS(float)
GSSF_CERTIFIED_KERNELS(c10::Half)
GSSF_CERTIFIED_KERNELS(c10::BFloat16)
#undef GSSF_CERTIFIED_KERNELS
