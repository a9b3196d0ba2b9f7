// Loads, stores, conversions, a dot product and an exponential. See isa.h.

// Vectors of one register each, for what has to stay in registers: the compiler keeps the parts of wider ones in
// memory.
template <class A>
struct Register {
  using Lane = typename Simd<A>::Lane;
  typedef A Vector __attribute__((vector_size(kRegisterBytes)));
  typedef Lane Index __attribute__((vector_size(kRegisterBytes)));
  static constexpr int64_t lanes = kRegisterBytes / sizeof(A);
};

template <class V>
GSSF_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
GSSF_INLINE void store(void* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// out[0:n] = in[0:n] in another floating type; plain loops that the compiler vectorises.
template <class To, class From>
GSSF_INLINE void convert(To* out, const From* in, int64_t n) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(out, in, n * sizeof(To));
  } else {
    for (int64_t k = 0; k < n; ++k) out[k] = static_cast<To>(in[k]);
  }
}

// One step of a transpose: swaps the corners of all blocks of 2 kStep x 2 kStep.
template <int kStep, class V, int L>
GSSF_INLINE void swap_corners(V (&row)[L]) {
  decltype(V{} < V{}) low, high;
  for (int k = 0; k < L; ++k) low[k] = k & kStep ? L + k - kStep : k, high[k] = k & kStep ? L + k : k + kStep;
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r)
    if (!(r & kStep)) {
      const V x = row[r], y = row[r + kStep];
      row[r] = __builtin_shuffle(x, y, low), row[r + kStep] = __builtin_shuffle(x, y, high);
    }
  if constexpr (2 * kStep < L) swap_corners<2 * kStep>(row);
}

// Transposes all blocks of 4 x 4, by instructions that move nothing between 16-byte parts of a register.
template <class V, int L>
GSSF_INLINE void transpose_quads(V (&row)[L]) {
  decltype(V{} < V{}) low, high, low_pairs, high_pairs;
  for (int k = 0; k < L; ++k) {
    const int part = k / 4 * 4, lane = k % 4;
    low[k] = part + lane / 2 + lane % 2 * L, high[k] = low[k] + 2;
    low_pairs[k] = part + lane % 2 + lane / 2 * L, high_pairs[k] = low_pairs[k] + 2;
  }
#pragma GCC unroll 16
  for (int r = 0; r < L; r += 4) {
    const V x = __builtin_shuffle(row[r], row[r + 1], low), y = __builtin_shuffle(row[r], row[r + 1], high);
    const V z = __builtin_shuffle(row[r + 2], row[r + 3], low), w = __builtin_shuffle(row[r + 2], row[r + 3], high);
    row[r] = __builtin_shuffle(x, z, low_pairs), row[r + 1] = __builtin_shuffle(x, z, high_pairs);
    row[r + 2] = __builtin_shuffle(y, w, low_pairs), row[r + 3] = __builtin_shuffle(y, w, high_pairs);
  }
}

// to [L, L] = the transpose of from [L, L] in registers, where L is the number of lanes of V and to_row, from_row are
// the strides of rows.
template <class V, class T>
GSSF_INLINE void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int L = sizeof(V) / sizeof(T);
  V row[L];
  for (int r = 0; r < L; ++r) row[r] = load<V>(from + r * from_row);
  if constexpr (sizeof(T) == 4) {
    transpose_quads(row);
    if constexpr (L > 4) swap_corners<4>(row);
  } else {
    swap_corners<1>(row);
  }
  for (int r = 0; r < L; ++r) store(to + r * to_row, row[r]);
}

template <class V>
GSSF_INLINE auto sum_lanes(const V& v) {
  auto total = v[0];
  for (size_t k = 1; k < sizeof(V) / sizeof(total); ++k) total += v[k];
  return total;
}

// Sum of x[k] * y[k] in A, for x and y already in A. Its bits are the same with registers of any size.
template <class A>
GSSF_INLINE A dot(const A* x, const A* y, int64_t n) {
  using V = typename Register<A>::Vector;
  constexpr int64_t L = Register<A>::lanes, kStep = Simd<A>::lanes, kParts = kStep / L;
  V sum[2 * kParts] = {};
  const auto add = [&](int64_t k, int64_t parts) {
    for (int64_t v = 0; v < parts; ++v) sum[v] += load<V>(x + k + v * L) * load<V>(y + k + v * L);
  };
  int64_t k = 0;
  for (; k + 2 * kStep <= n; k += 2 * kStep) add(k, 2 * kParts);
  for (; k + kStep <= n; k += kStep) add(k, kParts);
  A total = sum_lanes(sum[0] + sum[kParts]);
  for (int64_t v = 1; v < kParts; ++v) {
    const V both = sum[v] + sum[v + kParts];
    for (int64_t l = 0; l < L; ++l) total += both[l];
  }
  for (; k < n; ++k) total += x[k] * y[k];
  return total;
}

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
template <class A, class V>
GSSF_INLINE V exp_of(const V& x) {
  using I = decltype(x < x);
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

// max(‖row‖₂, eps): what a row is divided by; NaN stays NaN.
template <class A>
GSSF_INLINE A norm_divisor(A norm) {
  return norm < A(kEps) ? A(kEps) : norm;
}

// sum [dim] = the sum of dscores[e] * x[source[e]] over the edges e of destination d, in their order; with `normalize`
// of the unit rows of x. A zero gradient adds nothing. wide [dim] is scratch.
template <class T, class A>
GSSF_INLINE void gather_row(const T* x, const int64_t* source, const A* dscores, const Groups& groups, int64_t d,
                            int64_t dim, bool normalize, A* wide, A* sum) {
  std::fill_n(sum, dim, A(0));
  for (int64_t g = groups.first[d]; g < groups.first[d + 1]; ++g) {
    const int64_t e = groups.edge[g];
    if (dscores[e] == 0) continue;
    const A* row;
    if constexpr (std::is_same_v<T, A>) {
      row = x + source[e] * dim;
    } else {
      convert(wide, x + source[e] * dim, dim);
      row = wide;
    }
    const A weight = normalize ? dscores[e] / norm_divisor(std::sqrt(dot<A>(row, row, dim))) : dscores[e];
    for (int64_t k = 0; k < dim; ++k) sum[k] += weight * row[k];
  }
}
