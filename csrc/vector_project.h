// p = x̂ ∘ diag + blocks, for kChunkRows rows at a time, and its backward. See isa.h.

// c [R, NV vectors] += a [R, depth] b [depth, NV vectors]; of the last vector only `last` lanes are stored.
template <class A, int R, int NV>
GSSF_INLINE void product_tile(A* c, int64_t ldc, const A* a, int64_t a_row, int64_t a_depth, const A* b, int64_t ldb,
                              int64_t depth, int64_t last) {
  using V = typename Register<A>::Vector;
  constexpr int64_t L = Register<A>::lanes;
  V sum[R][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load<V>(b + k * ldb + v * L);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) sum[r][v] += a[r * a_row + k * a_depth] * row[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) {
      A* out = c + r * ldc + v * L;
      if (v + 1 < NV || last == L) {
        store(out, load<V>(out) + sum[r][v]);
      } else {
        for (int64_t k = 0; k < last; ++k) out[k] += sum[r][v][k];
      }
    }
}

constexpr int kProjectRows = kRegisters >= 32 ? 8 : 6;  // of a register tile

// c [m, n] += a [m, depth] b [depth, n], a by strides. Reads of b run up to a vector past its rows' ends.
template <class A>
GSSF_INLINE void add_product(A* c, int64_t ldc, const A* a, int64_t a_row, int64_t a_depth, const A* b, int64_t ldb,
                             int64_t m, int64_t depth, int64_t n) {
  constexpr int64_t L = Register<A>::lanes;
  for (int64_t j = 0; j < n;) {
    const bool two = n - j > L;
    const int64_t last = std::min(L, n - j - (two ? L : 0));
    int64_t i = 0;
    for (; i + kProjectRows <= m; i += kProjectRows) {
      if (two)
        product_tile<A, kProjectRows, 2>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
      else
        product_tile<A, kProjectRows, 1>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
    }
    for (; i < m; ++i) {
      if (two) product_tile<A, 1, 2>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
      else product_tile<A, 1, 1>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
    }
    j += (two ? L : 0) + last;
  }
}

// out += in · blocks; channels of `in` are in the order of the blocks, those of `out` in the original order.
template <class A>
GSSF_INLINE void add_blocks(const Weights<A>& weights, const std::vector<A>& blocks, Chunk<A>& in, Chunk<A>& out,
                            Chunk<A>& grouped_out, int64_t count) {
  const bool permuted = !weights.permutation.empty();
  Chunk<A>& target = permuted ? grouped_out : out;
  if (permuted) std::fill(target.rows.begin(), target.rows.end(), A(0));
  for (int64_t g = 0; g < weights.groups; ++g) {
    const int64_t first = g * weights.width;
    add_product<A>(target.row(0) + first, target.ld, in.row(0) + first, in.ld, 1, blocks.data() + first * weights.ld,
                   weights.ld, count, weights.width, weights.width);
  }
  if (!permuted) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < weights.dim; ++c) out.row(r)[weights.permutation[c]] += target.row(r)[c];
}

// `in` with its channels in the order of the blocks, written to `grouped`; without a permutation `in` itself.
template <class A>
GSSF_INLINE Chunk<A>& group(const Weights<A>& weights, Chunk<A>& in, Chunk<A>& grouped, int64_t count) {
  if (weights.permutation.empty()) return in;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < weights.dim; ++c) grouped.row(r)[c] = in.row(r)[weights.permutation[c]];
  return grouped;
}

// scratch.x = x̂ of `count` rows, scratch.norm their norms (1 without normalize).
template <class T, class A>
GSSF_INLINE void load_rows(const T* x, const Weights<A>& weights, Scratch<A>& scratch, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    A* row = scratch.x.row(r);
    convert(row, x + r * weights.dim, weights.dim);
    scratch.norm[r] = 1;
    if (!weights.normalize) continue;
    scratch.norm[r] = std::sqrt(dot<A>(row, row, weights.dim));
    const A divisor = norm_divisor(scratch.norm[r]);
    for (int64_t k = 0; k < weights.dim; ++k) row[k] /= divisor;
  }
}

// out = in ∘ diag, or 0 where there is no diagonal but blocks, or in where there is neither.
template <class A>
GSSF_INLINE void start_with_diagonal(const Weights<A>& weights, Chunk<A>& in, Chunk<A>& out, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    const A* from = in.row(r);
    A* to = out.row(r);
    if (!weights.diag.empty()) {
      for (int64_t k = 0; k < weights.dim; ++k) to[k] = from[k] * weights.diag[k];
    } else if (weights.groups > 0) {
      std::fill_n(to, weights.dim, A(0));
    } else {
      std::copy_n(from, weights.dim, to);
    }
  }
}

template <class T, class A>
GSSF_INLINE void project_chunk(const T* x, const Weights<A>& weights, Scratch<A>& scratch, T* p, int64_t count) {
  load_rows(x, weights, scratch, count);
  start_with_diagonal(weights, scratch.x, scratch.out, count);
  if (weights.groups > 0)
    add_blocks(weights, weights.blocks, group(weights, scratch.x, scratch.x_grouped, count), scratch.out,
               scratch.out_grouped, count);
  for (int64_t r = 0; r < count; ++r) convert(p + r * weights.dim, scratch.out.row(r), weights.dim);
}

// dx of rows first .. first + count (unless null), and their terms added to ddiag [D] and dblocks [G, b, b]
// (unless null).
template <class T, class A>
GSSF_INLINE void backward_chunk(const Upstream<T, A>& upstream, const T* x, const Weights<A>& weights,
                                Scratch<A>& scratch, T* dx, A* ddiag, A* dblocks, int64_t first, int64_t count) {
  const int64_t dim = weights.dim, width = weights.width;
  for (int64_t r = 0; r < count; ++r) {
    if (upstream.dense) {
      convert(scratch.g.row(r), upstream.dense + (first + r) * dim, dim);
    } else {
      gather_row(upstream.other, upstream.source, upstream.dscores, *upstream.groups, first + r, dim, weights.normalize,
                 scratch.out.row(0), scratch.g.row(r));
    }
  }
  load_rows(x + first * dim, weights, scratch, count);
  Chunk<A>& g = weights.groups > 0 ? group(weights, scratch.g, scratch.g_grouped, count) : scratch.g;
  if (ddiag) {
    // A sum of the sums of chunks rounds less than one long sum.
    A* sum = scratch.out.row(0);
    std::fill_n(sum, dim, A(0));
    for (int64_t r = 0; r < count; ++r) {
      const A *xhat = scratch.x.row(r), *row = scratch.g.row(r);
      for (int64_t k = 0; k < dim; ++k) sum[k] += xhat[k] * row[k];
    }
    for (int64_t k = 0; k < dim; ++k) ddiag[k] += sum[k];
  }
  if (dblocks) {
    Chunk<A>& xhat = group(weights, scratch.x, scratch.x_grouped, count);
    for (int64_t k = 0; k < dim; k += width)
      add_product<A>(dblocks + k * width, width, xhat.row(0) + k, 1, xhat.ld, g.row(0) + k, g.ld, width, count, width);
  }
  if (!dx) return;
  start_with_diagonal(weights, scratch.g, scratch.out, count);
  if (weights.groups > 0) add_blocks(weights, weights.transposed, g, scratch.out, scratch.out_grouped, count);
  for (int64_t r = 0; r < count; ++r) {
    A* row = scratch.out.row(r);
    if (weights.normalize) {
      const A *xhat = scratch.x.row(r), norm = scratch.norm[r];
      const bool clamped = norm < A(kEps);  // then x̂ is x / eps, which does not depend on the norm
      const A inner = clamped ? A(0) : dot<A>(xhat, row, dim), divisor = clamped ? A(kEps) : norm;
      for (int64_t k = 0; k < dim; ++k) row[k] = (row[k] - xhat[k] * inner) / divisor;
    }
    convert(dx + (first + r) * dim, row, dim);
  }
}

#define GSSF_PROJECT_KERNELS(T, A)                                                                                     \
  static void project_run(const T* x, const Weights<A>& weights, Scratch<A>& scratch, T* p, int64_t count) {           \
    project_chunk<T, A>(x, weights, scratch, p, count);                                                                \
  }                                                                                                                    \
  static void backward_run(const Upstream<T, A>& upstream, const T* x, const Weights<A>& weights, Scratch<A>& scratch, \
                           T* dx, A* ddiag, A* dblocks, int64_t first, int64_t count) {                                \
    backward_chunk<T, A>(upstream, x, weights, scratch, dx, ddiag, dblocks, first, count);                             \
  }
GSSF_PROJECT_KERNELS(float, float)
GSSF_PROJECT_KERNELS(double, double)
GSSF_PROJECT_KERNELS(c10::BFloat16, float)
GSSF_PROJECT_KERNELS(c10::Half, float)
#undef GSSF_PROJECT_KERNELS
