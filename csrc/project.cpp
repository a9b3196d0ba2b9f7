// gssf::project, its backward and that of hardest negatives on the CPU: one pass over x, kChunkRows rows at a time,
// which stay in L2.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "edges.h"

#define GSSF_KERNELS "vector_project.h"
#include "isa.h"

namespace gssf {
namespace {

using at::Tensor;

// Rows per partial of ddiag and dblocks: at most 32 partials, fewer where they would be larger than x. This depends on
// shapes alone, so that the thread count changes no bit of the sum.
int64_t split_rows(int64_t rows, int64_t width) {
  const int64_t splits = std::clamp<int64_t>(rows / std::max<int64_t>(width, 1), 2, 32);
  return std::max<int64_t>(1, ceil_div(ceil_div(rows, splits), kChunkRows)) * kChunkRows;
}

template <class A>
Weights<A> make_weights(int64_t dim, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                        const std::optional<Tensor>& permutation, bool normalize, bool backward) {
  const auto dtype = c10::CppTypeToScalarType<A>::value;
  Weights<A> out;
  out.dim = dim, out.normalize = normalize;
  if (diag) {
    const Tensor wide = diag->to(dtype).contiguous();
    out.diag.assign(wide.const_data_ptr<A>(), wide.const_data_ptr<A>() + dim);
  }
  if (blocks) {
    out.groups = blocks->size(0), out.width = blocks->size(1);
    out.ld = (out.width / Simd<A>::lanes + 2) * Simd<A>::lanes;
    const auto padded = [&](const Tensor& wide) {
      std::vector<A> rows(dim * out.ld, A(0));
      for (int64_t k = 0; k < dim; ++k)
        std::copy_n(wide.const_data_ptr<A>() + k * out.width, out.width, rows.data() + k * out.ld);
      return rows;
    };
    if (backward) out.transposed = padded(blocks->transpose(1, 2).to(dtype).contiguous());
    else out.blocks = padded(blocks->to(dtype).contiguous());
  }
  if (permutation) {
    const Tensor order = permutation->contiguous();
    out.permutation.assign(order.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>() + dim);
    for (const int64_t channel : out.permutation)
      TORCH_CHECK_VALUE(channel >= 0 && channel < dim, "permutation: expected channels 0..", dim - 1, ", got ",
                        channel);
  }
  return out;
}

void check_weights(const Tensor& x, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                   const std::optional<Tensor>& permutation) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected shape [N, D], got ", x.sizes());
  const int64_t dim = x.size(1);
  TORCH_CHECK_VALUE(!diag || diag->numel() == dim, "diag: expected shape [", dim, "]");
  TORCH_CHECK_VALUE(
      !blocks || (blocks->dim() == 3 && blocks->size(1) == blocks->size(2) && blocks->size(0) * blocks->size(1) == dim),
      "blocks: expected shape [G, b, b] with G*b = ", dim);
  TORCH_CHECK_VALUE(!permutation || permutation->numel() == dim, "permutation: expected shape [", dim, "]");
}

Tensor project_side(const Tensor& x_in, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                    const std::optional<Tensor>& permutation, bool normalize) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous();
  Tensor p = at::empty(x.sizes(), x.options());
  const int64_t rows = x.size(0), dim = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "project", [&] {
    using A = Accumulate<scalar_t>;
    const Weights<A> weights = make_weights<A>(dim, diag, blocks, permutation, normalize, false);
    at::parallel_for(0, ceil_div(rows, kChunkRows), 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(weights, false);
      for (int64_t first = begin * kChunkRows; first < std::min(rows, end * kChunkRows); first += kChunkRows)
        GSSF_VECTORIZED(project_run, x.const_data_ptr<scalar_t>() + first * dim, weights, scratch,
                        p.mutable_data_ptr<scalar_t>() + first * dim, std::min(kChunkRows, rows - first));
    });
  });
  return p;
}

// (dx, ddiag, dblocks) from `upstream`, grad_out of the projection's rows.
template <class T, class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Upstream<T, A>& upstream, const Tensor& x,
                                            const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                                            const std::optional<Tensor>& permutation, bool normalize,
                                            const c10::List<bool>& needs) {
  TORCH_CHECK_VALUE(needs.size() == 3, "needs: expected 3 flags, got ", needs.size());
  const bool need_diag = diag && needs[1], need_blocks = blocks && needs[2];
  const int64_t rows = x.size(0), dim = x.size(1);
  const int64_t diag_size = need_diag ? dim : 0, blocks_size = need_blocks ? blocks->numel() : 0;
  const Weights<A> weights = make_weights<A>(dim, diag, blocks, permutation, normalize, true);
  const int64_t split_size = split_rows(rows, weights.width), splits = ceil_div(rows, split_size);
  const int64_t partial_size = diag_size + blocks_size;
  const Tensor dx = needs[0] ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  T* const dx_rows = needs[0] ? dx.mutable_data_ptr<T>() : nullptr;
  const auto wide = x.options().dtype(c10::CppTypeToScalarType<A>::value);
  const Tensor partial = at::zeros({splits, partial_size}, wide), total = at::zeros({partial_size}, wide);
  A *const partials = partial.mutable_data_ptr<A>(), *const sum = total.mutable_data_ptr<A>();
  at::parallel_for(0, splits, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(weights, true);
    for (int64_t split = begin; split < end; ++split) {
      A* const terms = partials + split * partial_size;
      const int64_t stop = std::min(rows, (split + 1) * split_size);
      for (int64_t first = split * split_size; first < stop; first += kChunkRows)
        GSSF_VECTORIZED(backward_run, upstream, x.const_data_ptr<T>(), weights, scratch, dx_rows,
                        need_diag ? terms : nullptr, need_blocks ? terms + diag_size : nullptr, first,
                        std::min(kChunkRows, stop - first));
    }
  });
  at::parallel_for(0, partial_size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t split = 0; split < splits; ++split)
      for (int64_t k = begin; k < end; ++k) sum[k] += partials[split * partial_size + k];
  });
  const auto slice = [&](int64_t first, int64_t size, const std::optional<Tensor>& like) {
    const Tensor out = total.narrow(0, first, size).to(like ? like->scalar_type() : x.scalar_type(), false, true);
    return size > 0 ? out.view(like->sizes()) : out;
  };
  return {dx, slice(0, diag_size, diag), slice(diag_size, blocks_size, blocks)};
}

std::tuple<Tensor, Tensor, Tensor> project_side_backward(const Tensor& grad_out, const Tensor& x_in,
                                                         const std::optional<Tensor>& diag,
                                                         const std::optional<Tensor>& blocks,
                                                         const std::optional<Tensor>& permutation, bool normalize,
                                                         c10::List<bool> needs) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous(), grad_rows = grad_out.contiguous();
  TORCH_CHECK_VALUE(grad_rows.sizes() == x.sizes() && grad_rows.scalar_type() == x.scalar_type(),
                    "grad: expected shape ", x.sizes(), " and x's dtype, got ", grad_rows.sizes());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "project_backward", [&] {
    Upstream<scalar_t, Accumulate<scalar_t>> upstream;
    upstream.dense = grad_rows.const_data_ptr<scalar_t>();
    return backward(upstream, x, diag, blocks, permutation, normalize, needs);
  });
}

// The same for grad_out[i] = Σ_{e: rows[e] = i} dscores[e] ŷ[cols[e]], which is gathered row by row and never stored.
std::tuple<Tensor, Tensor, Tensor> pairs_project_backward(const Tensor& grad_out, const Tensor& rows_in,
                                                          const Tensor& cols_in, const Tensor& x_in, const Tensor& y_in,
                                                          const std::optional<Tensor>& diag,
                                                          const std::optional<Tensor>& blocks,
                                                          const std::optional<Tensor>& permutation, bool normalize,
                                                          c10::List<bool> needs) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous(), y = y_in.contiguous();
  const Tensor rows = rows_in.contiguous(), cols = cols_in.contiguous();
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(1) == x.size(1) && y.scalar_type() == x.scalar_type(),
                    "y: expected shape [M, ", x.size(1), "] and x's dtype, got ", y.sizes());
  check_edges(rows, cols, x.size(0), y.size(0));
  TORCH_CHECK_VALUE(grad_out.sizes() == rows.sizes(), "grad: expected shape ", rows.sizes(), ", got ",
                    grad_out.sizes());
  const Groups groups(rows.const_data_ptr<int64_t>(), cols.const_data_ptr<int64_t>(), rows.numel(), x.size(0));
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "pairs_project_backward", [&] {
    using A = Accumulate<scalar_t>;
    const Tensor dscores = grad_out.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const Upstream<scalar_t, A> upstream{nullptr, y.const_data_ptr<scalar_t>(), cols.const_data_ptr<int64_t>(),
                                         dscores.const_data_ptr<A>(), &groups};
    return backward(upstream, x, diag, blocks, permutation, normalize, needs);
  });
}

// (x̂ W, ŷ with y and normalize, an empty tensor for the norms, which the CPU's backward computes again, and with
// `pairs` the scores of the pairs (i, i)).
std::tuple<Tensor, Tensor, Tensor, Tensor> project(const Tensor& x, const std::optional<Tensor>& y,
                                                   const std::optional<Tensor>& diag,
                                                   const std::optional<Tensor>& blocks,
                                                   const std::optional<Tensor>& permutation, bool normalize,
                                                   bool pairs) {
  TORCH_CHECK_VALUE(y || !pairs, "pairs: expected y too");
  const auto wide = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor p = project_side(x, diag, blocks, permutation, normalize);
  const Tensor unit =
      y && normalize ? project_side(*y, std::nullopt, std::nullopt, std::nullopt, true) : at::empty({0}, x.options());
  Tensor positive_score = at::empty({0}, wide);
  if (pairs) {
    const Tensor i = at::arange(x.size(0), x.options().dtype(at::kLong));
    positive_score = pair_scores(p, normalize ? unit : *y, i, i);
  }
  return {p, unit, at::empty({0}, wide), positive_score};
}

// (dx, dy, ddiag, dblocks) from dp and dunit, the gradients of x̂ W and of ŷ; without y, y is x.
std::tuple<Tensor, Tensor, Tensor, Tensor> project_backward(
    const std::optional<Tensor>& dp, const std::optional<Tensor>& dunit, const Tensor&, const Tensor& x,
    const std::optional<Tensor>& y, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
    const std::optional<Tensor>& permutation, bool normalize, c10::List<bool> needs) {
  TORCH_CHECK_VALUE(needs.size() == 4, "needs: expected 4 flags, got ", needs.size());
  Tensor dx = at::empty({0}, x.options()), dy = at::empty({0}, x.options());
  Tensor ddiag = at::empty({0}, x.options()), dblocks = at::empty({0}, x.options());
  if (dp && (needs[0] || needs[2] || needs[3]))
    std::tie(dx, ddiag, dblocks) = project_side_backward(*dp, x, diag, blocks, permutation, normalize,
                                                         c10::List<bool>({needs[0], needs[2], needs[3]}));
  if (dunit && normalize && needs[y ? 1 : 0]) {
    const Tensor of_unit = std::get<0>(project_side_backward(
        *dunit, y ? *y : x, std::nullopt, std::nullopt, std::nullopt, true, c10::List<bool>({true, false, false})));
    if (y) dy = of_unit;
    else dx = dp ? dx + of_unit : of_unit;
  }
  return {dx, dy, ddiag, dblocks};
}

// (dx, dy, ddiag, dblocks) of the scores x̂ W ŷᵀ at (i, i), (i, row_index[i]) and (col_index[j], j), in this order.
std::tuple<Tensor, Tensor, Tensor, Tensor> hardest_negatives_backward(
    const Tensor& dpositive, const Tensor& drow, const Tensor& dcol, const Tensor& row_index_in,
    const Tensor& col_index_in, const Tensor& x, const Tensor& y, const std::optional<Tensor>& diag,
    const std::optional<Tensor>& blocks, const std::optional<Tensor>& permutation, bool normalize,
    c10::List<bool> needs) {
  TORCH_CHECK_VALUE(needs.size() == 4, "needs: expected 4 flags, got ", needs.size());
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2, "x, y: expected [N, D] and [M, D], got ", x.sizes(), " and ",
                    y.sizes());
  const int64_t n = x.size(0), m = y.size(0);
  const Tensor row_index = row_index_in.contiguous(), col_index = col_index_in.contiguous();
  TORCH_CHECK_VALUE(row_index.dim() == 1 && row_index.size(0) == n && row_index.scalar_type() == at::kLong &&
                        col_index.dim() == 1 && col_index.size(0) == m && col_index.scalar_type() == at::kLong,
                    "row_index, col_index: expected int64 [", n, "] and [", m, "], got ", row_index.sizes(), " and ",
                    col_index.sizes());
  const Tensor rows = at::empty({2 * n + m}, row_index.options()), cols = at::empty_like(rows);
  int64_t *i = rows.mutable_data_ptr<int64_t>(), *j = cols.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < n; ++e) i[e] = j[e] = i[n + e] = e;
  std::copy_n(row_index.const_data_ptr<int64_t>(), n, j + n);
  std::copy_n(col_index.const_data_ptr<int64_t>(), m, i + 2 * n);
  for (int64_t e = 0; e < m; ++e) j[2 * n + e] = e;
  const Tensor dscores = at::cat({dpositive, drow, dcol});
  Tensor dx = at::empty({0}, x.options()), dy = at::empty({0}, y.options());
  Tensor ddiag = at::empty({0}, x.options()), dblocks = at::empty({0}, x.options());
  if (!diag && !blocks && !normalize) {
    std::tie(dx, dy) = pair_scores_backward(dscores, rows, cols, x, y, c10::List<bool>({needs[0], needs[1]}));
    return {dx, dy, ddiag, dblocks};
  }
  if (needs[0] || needs[2] || needs[3])
    std::tie(dx, ddiag, dblocks) = pairs_project_backward(dscores, rows, cols, x, y, diag, blocks, permutation,
                                                          normalize, c10::List<bool>({needs[0], needs[2], needs[3]}));
  if (needs[1]) {  // W for y's rows, where x's rows have its transpose
    const std::optional<Tensor> transposed = blocks ? std::optional(blocks->mT()) : std::nullopt;
    dy = std::get<0>(pairs_project_backward(dscores, cols, rows, y, x, diag, transposed, permutation, normalize,
                                            c10::List<bool>({true, false, false})));
  }
  return {dx, dy, ddiag, dblocks};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("project", project);
  library.impl("project_backward", project_backward);
  library.impl("hardest_negatives_backward", hardest_negatives_backward);
}

}  // namespace gssf
