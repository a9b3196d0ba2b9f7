// Rounding to bf16 with what it loses, and the scores of a tile that may still be a line's best. See isa.h,
// certified.h.

// out [n] = x rounded to bf16, ties to even, subnormals to zero; zeros behind them up to `padded`.
// squares = {Σ x², Σ (x - out)²}, in fp32. What is bf16 already is copied, its squares left alone.
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
    V whole{}, lost{};
    for (int64_t k = 0; k < padded; k += L) {
      V v{};
      if (k + L <= n) convert(reinterpret_cast<float*>(&v), x + k, L);
      else if (k < n) convert(reinterpret_cast<float*>(&v), x + k, n - k);
      const I bits = (I)v, kept = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
      const I normal = (kept & 0x7f800000) == 0 ? I{} : kept;
      const V rest = v - (V)normal;
      whole += v * v;
      lost += rest * rest;
      store(out + k, __builtin_convertvector((normal >> 16) & 0xffff, Narrow));
    }
    squares[0] = sum_lanes(whole);
    squares[1] = sum_lanes(lost);
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
    for (int64_t part = 0; part < 4; ++part) sum[part] += wide(p + part * L) * wide(q + part * L);
  };
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    for (int64_t line = k; line < k + kStep; line += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(next_x + line), __builtin_prefetch(next_y + line);
    add(x + k, y + k);
  }
  if (k < n) {
    T last_x[kStep] = {}, last_y[kStep] = {};
    std::copy(x + k, x + n, last_x), std::copy(y + k, y + n, last_y);
    add(last_x, last_y);
  }
  V total = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  for (int64_t half = L / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) total[l] += total[l + half];
  return total[0];
}

// -inf at those of s [n, m] whose ids are equal.
static void mask_ids_of(float* s, int64_t n, int64_t m, const int32_t* row_id, const int32_t* col_id) {
  using V = Simd<float>::Vector;
  using I = Simd<float>::Index;
  const V none = V{} - std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += Simd<float>::lanes) {
      float* at = s + i * kTileMost + j;
      store(at, load<I>(col_id + j) == I{} + row_id[i] ? none : load<V>(at));
    }
}

// The largest of every row of s [n, m], and of every column; behind each row stands -inf up to a whole vector. No NaN.
static void tile_tops_of(const float* s, int64_t n, int64_t m, float* row, float* col) {
  using V = Simd<float>::Vector;
  constexpr int64_t L = Simd<float>::lanes;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  std::fill_n(col, ceil_div(m, L) * L, kNone);
  for (int64_t i = 0; i < n; ++i) {
    V best = V{} + kNone;
    for (int64_t j = 0; j < m; j += L) {
      const V v = load<V>(s + i * kTileMost + j), c = load<V>(col + j);
      best = v > best ? v : best;
      store(col + j, v > c ? v : c);
    }
    float top = best[0];
    for (int64_t l = 1; l < L; ++l) top = std::max(top, best[l]);
    row[i] = top;
  }
}

// Writes the places i * kTileMost + j at which s [n, m] reaches row_least[i] or col_least[j], and returns how many
// there are; `places` has room for all. col_least is +inf behind the last column.
static int64_t reaching_of(const float* s, int64_t n, int64_t m, const float* row_least, const float* col_least,
                           int32_t* places) {
  using V = Simd<float>::Vector;
  using I = Simd<float>::Index;
  constexpr int64_t L = Simd<float>::lanes;
  const auto any = [](const I& mask) {
    int64_t word[8], all = 0;
    std::memcpy(word, &mask, sizeof(mask));
    for (const int64_t w : word) all |= w;
    return all != 0;
  };
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const V least = V{} + row_least[i];
    const auto hits = [&](int64_t j) {
      const V v = load<V>(s + i * kTileMost + j);
      return (v >= least) | (v >= load<V>(col_least + j));
    };
    I seen{};
    for (int64_t j = 0; j < m; j += L) seen |= hits(j);
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
