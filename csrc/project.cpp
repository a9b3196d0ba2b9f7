// gssf::project and its backward on the CPU: one pass over x, in chunks of rows that stay in L2.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"

namespace gssf {
namespace {

using at::Tensor;

constexpr int64_t kChunkRows = 64;   // rows in flight per thread
constexpr int64_t kSplitRows = 512;  // rows summed into one partial ddiag, dblocks: fixed, so deterministic
constexpr double kEps = 1e-12;       // smallest norm divided by, as in torch.nn.functional.normalize

// c [R, NV vectors] += a [R, depth] b [depth, NV vectors]; of the last vector only `last` lanes are stored.
template <class A, int R, int NV>
GSSF_INLINE void product_tile(
    A* c, int64_t ldc, const A* a, int64_t a_row, int64_t a_depth, const A* b, int64_t ldb, int64_t depth, int64_t last) {
  using V = typename Simd<A>::Vector;
  constexpr int64_t L = Simd<A>::lanes;
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

// c [m, n] += a [m, depth] b [depth, n], a by strides. Reads of b run up to a vector past its rows' ends.
template <class A>
GSSF_INLINE void add_product(
    A* c, int64_t ldc, const A* a, int64_t a_row, int64_t a_depth, const A* b, int64_t ldb, int64_t m, int64_t depth,
    int64_t n) {
  constexpr int64_t L = Simd<A>::lanes;
  for (int64_t j = 0; j < n;) {
    const bool pair = n - j > L;
    const int64_t last = std::min(L, n - j - (pair ? L : 0));
    int64_t i = 0;
    for (; i + 8 <= m; i += 8) {
      if (pair) product_tile<A, 8, 2>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
      else product_tile<A, 8, 1>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
    }
    for (; i < m; ++i) {
      if (pair) product_tile<A, 1, 2>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
      else product_tile<A, 1, 1>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_depth, b + j, ldb, depth, last);
    }
    j += (pair ? L : 0) + last;
  }
}

// The weights in A, blocks padded so that a whole vector may be read anywhere, and transposed too.
template <class A>
struct Weights {
  int64_t dim = 0, groups = 0, width = 0, ld = 0;
  bool normalize = false;
  std::vector<A> diag, blocks, transposed;
  std::vector<int64_t> permutation;

  Weights(int64_t dim, const std::optional<Tensor>& w, const std::optional<Tensor>& B, const std::optional<Tensor>& P,
          bool normalize)
      : dim(dim), normalize(normalize) {
    const auto dtype = c10::CppTypeToScalarType<A>::value;
    if (w) {
      const Tensor wide = w->to(dtype).contiguous();
      diag.assign(wide.const_data_ptr<A>(), wide.const_data_ptr<A>() + dim);
    }
    if (B) {
      groups = B->size(0), width = B->size(1), ld = (width / Simd<A>::lanes + 2) * Simd<A>::lanes;
      blocks = padded(B->to(dtype).contiguous());
      transposed = padded(B->transpose(1, 2).to(dtype).contiguous());
    }
    if (P) {
      const Tensor order = P->contiguous();
      permutation.assign(order.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>() + dim);
      for (const int64_t channel : permutation)
        TORCH_CHECK_VALUE(channel >= 0 && channel < dim, "permutation: expected channels 0..", dim - 1, ", got ", channel);
    }
  }

 private:
  std::vector<A> padded(const Tensor& B) const {
    std::vector<A> out(dim * ld, A(0));
    for (int64_t k = 0; k < dim; ++k) std::copy_n(B.const_data_ptr<A>() + k * width, width, out.data() + k * ld);
    return out;
  }
};

// Scratch for one chunk of rows, in A; rows lie apart by a little more than dim to avoid cache aliasing.
template <class A>
struct Chunk {
  int64_t ld;
  std::vector<A> rows;
  explicit Chunk(int64_t dim) : ld((dim / 16 + 2) * 16), rows(kChunkRows * ld) {}
  A* row(int64_t r) { return rows.data() + r * ld; }
};

// out += in · blocks (each row in the grouped order of channels, back to their own order after).
template <class A>
GSSF_INLINE void add_blocks(
    const Weights<A>& weights, const std::vector<A>& blocks, Chunk<A>& in, Chunk<A>& out, Chunk<A>& grouped_out, int64_t count) {
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

// grouped = in with its channels in the grouped order; in itself where that is the same.
template <class A>
GSSF_INLINE Chunk<A>& group(const Weights<A>& weights, Chunk<A>& in, Chunk<A>& grouped, int64_t count) {
  if (weights.permutation.empty()) return in;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < weights.dim; ++c) grouped.row(r)[c] = in.row(r)[weights.permutation[c]];
  return grouped;
}

template <class A>
struct Scratch {
  Chunk<A> x, g, out, x_grouped, g_grouped, out_grouped;
  std::vector<A> norm;
  explicit Scratch(int64_t dim) : x(dim), g(dim), out(dim), x_grouped(dim), g_grouped(dim), out_grouped(dim), norm(kChunkRows) {}
};

// scratch.x = x̂ of `count` rows, scratch.norm their norms (1 where none is asked for).
template <class T, class A>
GSSF_INLINE void load_rows(const T* x, const Weights<A>& weights, Scratch<A>& scratch, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    A* row = scratch.x.row(r);
    convert(row, x + r * weights.dim, weights.dim);
    scratch.norm[r] = 1;
    if (!weights.normalize) continue;
    scratch.norm[r] = std::sqrt(dot<A>(row, row, weights.dim));
    const A divisor = scratch.norm[r] < A(kEps) ? A(kEps) : scratch.norm[r];  // NaN stays NaN
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

// dx of `count` rows (unless null), and their terms added to ddiag [D] and dblocks [G, b, b] (unless null).
template <class T, class A>
GSSF_INLINE void backward_chunk(
    const T* grad, const T* x, const Weights<A>& weights, Scratch<A>& scratch, T* dx, A* ddiag, A* dblocks, int64_t count) {
  const int64_t dim = weights.dim, width = weights.width;
  load_rows(x, weights, scratch, count);
  for (int64_t r = 0; r < count; ++r) convert(scratch.g.row(r), grad + r * dim, dim);
  Chunk<A>& g = weights.groups > 0 ? group(weights, scratch.g, scratch.g_grouped, count) : scratch.g;
  if (ddiag)
    for (int64_t r = 0; r < count; ++r) {
      const A *xhat = scratch.x.row(r), *row = scratch.g.row(r);
      for (int64_t k = 0; k < dim; ++k) ddiag[k] += xhat[k] * row[k];
    }
  if (dblocks) {
    Chunk<A>& xhat = group(weights, scratch.x, scratch.x_grouped, count);
    for (int64_t first = 0; first < dim; first += width)
      add_product<A>(dblocks + first * width, width, xhat.row(0) + first, 1, xhat.ld, g.row(0) + first, g.ld, width,
                     count, width);
  }
  if (!dx) return;
  start_with_diagonal(weights, scratch.g, scratch.out, count);
  if (weights.groups > 0) add_blocks(weights, weights.transposed, g, scratch.out, scratch.out_grouped, count);
  for (int64_t r = 0; r < count; ++r) {
    A* row = scratch.out.row(r);
    if (weights.normalize) {
      const A *xhat = scratch.x.row(r), norm = scratch.norm[r];
      const bool clamped = norm < A(kEps);  // there x̂ is x / eps, and the norm has no part in it
      const A along = clamped ? A(0) : dot<A>(xhat, row, dim), divisor = clamped ? A(kEps) : norm;
      for (int64_t k = 0; k < dim; ++k) row[k] = (row[k] - xhat[k] * along) / divisor;
    }
    convert(dx + r * dim, row, dim);
  }
}

#define GSSF_PROJECT_CLONES(T, A)                                                                                       \
  GSSF_CLONES void project_run(const T* x, const Weights<A>& weights, Scratch<A>& scratch, T* p, int64_t count) {      \
    project_chunk<T, A>(x, weights, scratch, p, count);                                                                 \
  }                                                                                                                     \
  GSSF_CLONES void backward_run(const T* grad, const T* x, const Weights<A>& weights, Scratch<A>& scratch, T* dx,      \
                                A* ddiag, A* dblocks, int64_t count) {                                                  \
    backward_chunk<T, A>(grad, x, weights, scratch, dx, ddiag, dblocks, count);                                         \
  }
GSSF_PROJECT_CLONES(float, float)
GSSF_PROJECT_CLONES(double, double)
GSSF_PROJECT_CLONES(c10::BFloat16, float)
GSSF_PROJECT_CLONES(c10::Half, float)
#undef GSSF_PROJECT_CLONES

void check_weights(const Tensor& x, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                   const std::optional<Tensor>& permutation) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected shape [N, D], got ", x.sizes());
  const int64_t dim = x.size(1);
  TORCH_CHECK_VALUE(!diag || diag->numel() == dim, "diag: expected shape [", dim, "]");
  TORCH_CHECK_VALUE(!blocks || (blocks->dim() == 3 && blocks->size(1) == blocks->size(2) && blocks->size(0) * blocks->size(1) == dim),
              "blocks: expected shape [G, b, b] with G*b = ", dim);
  TORCH_CHECK_VALUE(!permutation || permutation->numel() == dim, "permutation: expected shape [", dim, "]");
}

Tensor project(const Tensor& x_in, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
               const std::optional<Tensor>& permutation, bool normalize) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous();
  Tensor p = at::empty(x.sizes(), x.options());
  const int64_t rows = x.size(0), dim = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "project", [&] {
    using A = Accumulate<scalar_t>;
    const Weights<A> weights(dim, diag, blocks, permutation, normalize);
    at::parallel_for(0, (rows + kChunkRows - 1) / kChunkRows, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(dim);
      for (int64_t first = begin * kChunkRows; first < std::min(rows, end * kChunkRows); first += kChunkRows)
        project_run(x.const_data_ptr<scalar_t>() + first * dim, weights, scratch,
                    p.mutable_data_ptr<scalar_t>() + first * dim, std::min(kChunkRows, rows - first));
    });
  });
  return p;
}

std::tuple<Tensor, Tensor, Tensor> project_backward(
    const Tensor& grad_in, const Tensor& x_in, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
    const std::optional<Tensor>& permutation, bool normalize, c10::List<bool> needs) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous();
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && needs.size() == 3,
              "grad: expected shape ", x.sizes(), " and x's dtype, got ", grad.sizes());
  const bool need_diag = diag && needs[1], need_blocks = blocks && needs[2];
  const int64_t rows = x.size(0), dim = x.size(1);
  const int64_t diag_size = need_diag ? dim : 0, blocks_size = need_blocks ? blocks->numel() : 0;
  const int64_t splits = (rows + kSplitRows - 1) / kSplitRows, partial_size = diag_size + blocks_size;
  Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options()), ddiag, dblocks;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "project_backward", [&] {
    using A = Accumulate<scalar_t>;
    const Weights<A> weights(dim, diag, blocks, permutation, normalize);
    const auto wide = x.options().dtype(c10::CppTypeToScalarType<A>::value);
    const Tensor partial = at::zeros({splits, partial_size}, wide);
    at::parallel_for(0, splits, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(dim);
      for (int64_t split = begin; split < end; ++split) {
        A* sums = partial.mutable_data_ptr<A>() + split * partial_size;
        for (int64_t first = split * kSplitRows; first < std::min(rows, (split + 1) * kSplitRows); first += kChunkRows)
          backward_run(grad.const_data_ptr<scalar_t>() + first * dim, x.const_data_ptr<scalar_t>() + first * dim, weights,
                       scratch, needs[0] ? dx.mutable_data_ptr<scalar_t>() + first * dim : nullptr,
                       need_diag ? sums : nullptr, need_blocks ? sums + diag_size : nullptr,
                       std::min(kChunkRows, rows - first));
      }
    });
    const Tensor total = at::zeros({partial_size}, wide);
    A* sum = total.mutable_data_ptr<A>();
    at::parallel_for(0, partial_size, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t split = 0; split < splits; ++split) {
        const A* terms = partial.const_data_ptr<A>() + split * partial_size;
        for (int64_t k = begin; k < end; ++k) sum[k] += terms[k];
      }
    });
    ddiag = total.narrow(0, 0, diag_size).to(diag ? diag->scalar_type() : x.scalar_type(), false, true);
    dblocks = total.narrow(0, diag_size, blocks_size).to(blocks ? blocks->scalar_type() : x.scalar_type(), false, true);
    if (need_blocks) dblocks = dblocks.view(blocks->sizes());
  });
  return {dx, ddiag, dblocks};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("project", project);
  library.impl("project_backward", project_backward);
}

}  // namespace gssf
