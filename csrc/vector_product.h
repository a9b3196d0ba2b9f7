// Matrix products: c [n, m] = a [n, k] b with b in panels (types.h). See isa.h.

// A register tile: kTileRows rows of kTileVectors vectors, the sums of a chain. Other registers hold kTileVectors
// vectors of a row of b, and an element of a. The sums of all chains are in registers too if there are so many.
constexpr int kTileVectors = 2;
constexpr int kTileRows = kRegisters >= 8 ? 6 : 4;

// sum [R, kTileVectors vectors] = Σ_l a[:, l] b[l, :] over `count` channels.
template <class A, int R>
GSSF_INLINE void chain(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t count,
                       typename Register<A>::Vector (&sum)[R][kTileVectors]) {
  using V = typename Register<A>::Vector;
  for (int64_t l = 0; l < count; ++l) {
    V y[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) y[v] = load<V>(b + l * kPanel<A> + v * Register<A>::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += a[r * a_row + l * a_step] * y[v];
  }
}

// c [R, kTileVectors vectors] = or += Σ_l a[:, l] b[l, :] over `depth` channels.
template <class A, int R>
GSSF_INLINE void tile(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t depth, A* c, int64_t c_row,
                      bool add) {
  using V = typename Register<A>::Vector;
  constexpr int64_t L = Register<A>::lanes;
  V total[R][kTileVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v) total[r][v] = add ? load<V>(c + r * c_row + v * L) : V{};
  for (int64_t l = 0; l < depth; l += kChain) {
    V sum[R][kTileVectors] = {};
    const A *x = a + l * a_step, *y = b + l * kPanel<A>;
    if (depth - l >= kChain) chain<A, R>(x, a_row, a_step, y, kChain, sum);
    else chain<A, R>(x, a_row, a_step, y, depth - l, sum);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileVectors; ++v) total[r][v] += sum[r][v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v) store(c + r * c_row + v * L, total[r][v]);
}

// Rows first .. n times one panel over `depth` channels, R rows at a time, then fewer.
template <class A, int R>
GSSF_INLINE void tiles(const Product<A>& p, int64_t first, const A* a, const A* b, int64_t depth, A* c, int64_t width,
                       bool add) {
  constexpr int64_t L = Register<A>::lanes;
  for (; first + R <= p.n; first += R) {
    const A* rows = a + first * p.a_row;
    for (int64_t j = 0; j < width; j += kTileVectors * L) {
      A* out = c + first * p.c_row + j;
      const int64_t rest = width - j;
      if (rest >= kTileVectors * L) {
        tile<A, R>(rows, p.a_row, p.a_step, b + j, depth, out, p.c_row, add);
        continue;
      }
      A edge[R * kPanel<A>] = {};
      for (int64_t r = 0; r < R && add; ++r) std::copy_n(out + r * p.c_row, rest, edge + r * kPanel<A>);
      tile<A, R>(rows, p.a_row, p.a_step, b + j, depth, edge, kPanel<A>, true);
      for (int64_t r = 0; r < R; ++r) std::copy_n(edge + r * kPanel<A>, rest, out + r * p.c_row);
    }
  }
  if constexpr (R > 1) tiles<A, (R > 4 ? 4 : R / 2)>(p, first, a, b, depth, c, width, add);
}

template <class A>
GSSF_INLINE void product(const Product<A>& p) {
  for (int64_t l = 0; l < p.k || l == 0; l += kDepth) {
    const int64_t depth = std::min(kDepth, p.k - l);
    for (int64_t j = 0; j < p.m; j += kPanel<A>) {
      const A* panel = p.panels + j / kPanel<A> * p.panel + l * kPanel<A>;
      const A* next = j + kPanel<A> < p.m ? panel + p.panel : p.panels + (l + kDepth) * kPanel<A>;
      if (j + kPanel<A> < p.m || l + kDepth < p.k)  // into the cache, while this panel is in use
        for (int64_t at = 0; at < depth * kPanel<A>; at += 64 / sizeof(A)) __builtin_prefetch(next + at, 0, 2);
      tiles<A, kTileRows>(p, 0, p.a + l * p.a_step, panel, depth, p.c + j, std::min(kPanel<A>, p.m - j),
                          p.add || l > 0);
    }
  }
}

// Rows of y, whose columns are adjacent, to all panels.
template <class T, class A>
GSSF_INLINE void pack_rows(const Packing<T, A>& p) {
  const int64_t whole = p.width / kPanel<A> * kPanel<A>, rest = p.width - whole;
  for (int64_t l = 0; l < p.k; ++l) {
    const T* row = p.y + l * p.row;
    A* to = p.panels + l * kPanel<A>;
    for (int64_t j = 0; j < whole; j += kPanel<A>, to += p.apart) convert(to, row + j, kPanel<A>);
    if (rest == 0) continue;
    convert(to, row + whole, rest);
    std::fill_n(to + rest, kPanel<A> - rest, A(0));
  }
}

// One panel, at most kPanel columns, from adjacent rows or any other order.
template <class T, class A>
GSSF_INLINE void pack_columns(const Packing<T, A>& p) {
  for (int64_t l0 = 0; l0 < p.k; l0 += kDepth) {  // kDepth channels of a panel stay in the cache
    const int64_t l1 = std::min(l0 + kDepth, p.k);
    if (p.width < kPanel<A>) std::fill(p.panels + l0 * kPanel<A>, p.panels + l1 * kPanel<A>, A(0));
    int64_t j = 0;
    if constexpr (std::is_same_v<T, A>) {
      constexpr int64_t L = Register<A>::lanes;
      for (; p.row == 1 && j + L <= p.width; j += L) {
        int64_t l = l0;
        for (; l + L <= l1; l += L)
          transpose<typename Register<A>::Vector>(p.y + l + j * p.col, p.col, p.panels + l * kPanel<A> + j, kPanel<A>);
        for (; l < l1; ++l)
          for (int64_t c = j; c < j + L; ++c) p.panels[l * kPanel<A> + c] = p.y[l + c * p.col];
      }
    }
    for (; j < p.width; ++j)
      for (int64_t l = l0; l < l1; ++l) p.panels[l * kPanel<A> + j] = static_cast<A>(p.y[l * p.row + j * p.col]);
  }
}

template <class T, class A>
GSSF_INLINE void pack(const Packing<T, A>& p) {
  if (p.col == 1) pack_rows(p);
  else pack_columns(p);
}

typedef uint32_t Pairs __attribute__((vector_size(64)));  // of bf16

// The bits of 16 adjacent numbers rounded to bf16, ties to even, each in 32; NaN stays NaN.
template <class T>
GSSF_INLINE Pairs bf16_bits(const T* x) {
  using V = Simd<float>::Vector;
  typedef uint16_t Narrow __attribute__((vector_size(32)));
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return __builtin_convertvector(load<Narrow>(static_cast<const void*>(x)), Pairs);
  } else {
    float wide[Simd<float>::lanes];
    convert(wide, x, Simd<float>::lanes);
    const V v = load<V>(wide);
    const Pairs bits = (Pairs)v;
    return v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : Pairs{} + 0x7fc0;
  }
}

// A block of 16 rows and 32 channels. block[r]: the pairs of row r if by_row, else pair r of all rows.
template <class T>
GSSF_INLINE void pair_block(const T* x, int64_t row, int64_t channel, bool by_row, uint32_t* block) {
  constexpr int64_t L = Simd<float>::lanes;
  typedef uint16_t Narrow __attribute__((vector_size(32)));
  for (int64_t r = 0; r < L; ++r) {
    if (!by_row) {
      store(block + r * L, bf16_bits(x + 2 * r * channel) | (bf16_bits(x + (2 * r + 1) * channel) << 16));
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      std::memcpy(block + r * L, x + r * row, 64);
    } else {
      store(block + r * L, __builtin_convertvector(bf16_bits(x + r * row), Narrow));
      store(block + r * L + L / 2, __builtin_convertvector(bf16_bits(x + r * row + L), Narrow));
    }
  }
}

template <class T>
GSSF_INLINE void pairs(const Pairing<T>& p) {
  constexpr int64_t L = Simd<float>::lanes, C = 2 * L;  // rows and channels of a block
  const auto round = [&](int64_t i, int64_t l) {
    const T* x = p.x + i * p.row + l * p.channel;
    alignas(64) uint32_t block[L * L];
    const int64_t rows = std::min(p.rows - i, L), channels = std::min(p.channels - l, C);
    bool by_row = p.channel == 1;
    if (rows == L && channels == C && (by_row || p.row == 1)) {
      pair_block(x, p.row, p.channel, by_row, block);
    } else {  // the last rows or channels, or neither are adjacent
      T copy[L * C];
      std::memset(static_cast<void*>(copy), 0, sizeof(copy));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < channels; ++k) copy[r * C + k] = x[r * p.row + k * p.channel];
      pair_block(copy, C, 1, by_row = true, block);
    }
    const bool out_by_row = p.out_pair == 1;
    uint32_t* out = p.out + i * p.out_row + l / 2 * p.out_pair;
    const int64_t step = out_by_row ? p.out_row : p.out_pair;
    if (by_row != out_by_row) {
      if constexpr (kRegisterBytes == 64) {
        transpose<Simd<float>::Index>(block, L, out, step);
      } else {  // no processor with a bf16 unit comes here, and the shuffles would take seconds to compile
        for (int64_t r = 0; r < L; ++r)
          for (int64_t k = 0; k < L; ++k) out[r * step + k] = block[k * L + r];
      }
    } else {
      for (int64_t r = 0; r < L; ++r) store(out + r * step, load<Pairs>(block + r * L));
    }
  };
  // In the order of x in memory.
  if (p.row == 1) {
    for (int64_t l = 0; l < p.channels; l += C)
      for (int64_t i = 0; i < p.padded_rows; i += L) round(i, l);
  } else {
    for (int64_t i = 0; i < p.padded_rows; i += L)
      for (int64_t l = 0; l < p.channels; l += C) round(i, l);
  }
}

#define GSSF_PRODUCT_KERNELS(T, A) \
  static void pack_of(const Packing<T, A>& p) { pack<T, A>(p); }
static void product_of(const Product<float>& p) { product(p); }
static void product_of(const Product<double>& p) { product(p); }
GSSF_PRODUCT_KERNELS(float, float)
GSSF_PRODUCT_KERNELS(double, double)
GSSF_PRODUCT_KERNELS(c10::Half, float)
GSSF_PRODUCT_KERNELS(c10::BFloat16, float)
#undef GSSF_PRODUCT_KERNELS
static void pairs_of(const Pairing<float>& p) { pairs(p); }
static void pairs_of(const Pairing<c10::Half>& p) { pairs(p); }
static void pairs_of(const Pairing<c10::BFloat16>& p) { pairs(p); }
