// gssf::hinge_terms and its gradient on the CPU: see gssf_kernels/statistics/hinge.py.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>

namespace gssf {

using at::Tensor;

namespace {

// The statistics of N anchors: positive and row [N], col [M] of which the first N are theirs.
template <class A>
struct Anchors {
  const A *positive, *row, *col;
  A margin;
  A rows(int64_t i) const { return margin + row[i] - positive[i]; }
  A cols(int64_t i) const { return margin + col[i] - positive[i]; }
};

template <class A>
A hinge(A t) {
  return t < 0 ? A(0) : t;  // NaN passes
}

void check(const Tensor& positive, const Tensor& row, const Tensor& col, std::string_view reduction) {
  TORCH_CHECK_VALUE(positive.dim() == 1 && row.sizes() == positive.sizes() && col.dim() == 1 &&
                        col.size(0) >= positive.size(0) && row.scalar_type() == positive.scalar_type() &&
                        col.scalar_type() == positive.scalar_type(),
                    "positive, row, col: expected [N], [N] and [M] of one dtype, got ", positive.sizes(), ", ",
                    row.sizes(), " and ", col.sizes());
  TORCH_CHECK_VALUE(reduction == "none" || reduction == "sum" || reduction == "mean", "no such reduction: ", reduction);
}

Tensor hinge_terms(const Tensor& positive_in, const Tensor& row_in, const Tensor& col_in, double margin,
                   std::string_view reduction) {
  check(positive_in, row_in, col_in, reduction);
  const Tensor positive = positive_in.contiguous(), row = row_in.contiguous(), col = col_in.contiguous();
  const int64_t n = positive.size(0);
  const bool each = reduction == "none";
  Tensor out = each ? at::empty_like(positive) : at::empty({}, positive.options());
  AT_DISPATCH_FLOATING_TYPES(positive.scalar_type(), "hinge_terms", [&] {
    using A = scalar_t;
    const Anchors<A> anchors{positive.const_data_ptr<A>(), row.const_data_ptr<A>(), col.const_data_ptr<A>(), A(margin)};
    A* terms = out.mutable_data_ptr<A>();
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A term = hinge(anchors.rows(i)) + hinge(anchors.cols(i));
      if (each) terms[i] = term;
      total += term;
    }
    if (!each) *terms = A(reduction == "mean" ? total / std::max<int64_t>(n, 1) : total);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> hinge_terms_backward(const Tensor& grad, const Tensor& positive_in,
                                                        const Tensor& row_in, const Tensor& col_in, double margin,
                                                        std::string_view reduction) {
  check(positive_in, row_in, col_in, reduction);
  const Tensor positive = positive_in.contiguous(), row = row_in.contiguous(), col = col_in.contiguous();
  const int64_t n = positive.size(0), m = col.size(0);
  const bool each = reduction == "none";
  TORCH_CHECK_VALUE(grad.dim() == each && (!each || grad.size(0) == n) && grad.scalar_type() == row.scalar_type(),
                    "grad: expected the shape and dtype of the result, got ", grad.sizes());
  Tensor dpositive = at::empty_like(positive), drow = at::empty_like(row), dcol = at::empty_like(col);
  AT_DISPATCH_FLOATING_TYPES(positive.scalar_type(), "hinge_terms_backward", [&] {
    using A = scalar_t;
    const Anchors<A> anchors{positive.const_data_ptr<A>(), row.const_data_ptr<A>(), col.const_data_ptr<A>(), A(margin)};
    const A* above = grad.const_data_ptr<A>();
    const int64_t stride = each ? grad.stride(0) : 0;
    const A share = reduction == "mean" ? A(std::max<int64_t>(n, 1)) : A(1);
    A *dp = dpositive.mutable_data_ptr<A>(), *dr = drow.mutable_data_ptr<A>(), *dc = dcol.mutable_data_ptr<A>();
    for (int64_t i = 0; i < n; ++i) {
      const A g = above[i * stride] / share;
      dr[i] = anchors.rows(i) < 0 ? A(0) : g;
      dc[i] = anchors.cols(i) < 0 ? A(0) : g;
      dp[i] = -(dr[i] + dc[i]);
    }
    std::fill(dc + n, dc + m, A(0));
  });
  return {dpositive, drow, dcol};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("hinge_terms", hinge_terms);
  library.impl("hinge_terms_backward", hinge_terms_backward);
}

}  // namespace gssf
