// gssf::hinge_terms, gssf::contrast_terms and their gradients on the CPU: see gssf_kernels/statistics/terms.py.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
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

void check_line(const Tensor& t, int64_t least, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) >= least && t.scalar_type() == like.scalar_type(), name,
                    ": expected at least ", least, " entries of the other lines' dtype, got ", t.sizes());
}

Tensor contrast_terms(const Tensor& row_max_in, const Tensor& row_log_in, const Tensor& row_target_in,
                      const std::optional<Tensor>& col_max_in, const std::optional<Tensor>& col_log_in,
                      const std::optional<Tensor>& col_target_in, std::string_view reduction) {
  const int64_t n = row_log_in.size(0);
  const bool each = reduction == "none", both = col_log_in.has_value();
  check_line(row_max_in, n, row_log_in, "row_max");
  check_line(row_target_in, n, row_log_in, "row_target");
  if (both) {
    TORCH_CHECK_VALUE(col_max_in, "col_max: expected with col_log");
    check_line(*col_max_in, n, row_log_in, "col_max");
    check_line(*col_log_in, n, row_log_in, "col_log");
    if (col_target_in) check_line(*col_target_in, n, row_log_in, "col_target");
  }
  const Tensor row_max = row_max_in.contiguous(), row_log = row_log_in.contiguous();
  const Tensor row_target = row_target_in.contiguous();
  const Tensor col_max = both ? col_max_in->contiguous() : row_max, col_log = both ? col_log_in->contiguous() : row_log;
  const Tensor col_target = both && col_target_in ? col_target_in->contiguous() : row_target;
  Tensor out = each ? at::empty({n}, row_log.options()) : at::empty({}, row_log.options());
  AT_DISPATCH_FLOATING_TYPES(row_log.scalar_type(), "contrast_terms", [&] {
    using A = scalar_t;
    const A *rm = row_max.const_data_ptr<A>(), *rl = row_log.const_data_ptr<A>();
    const A *rt = row_target.const_data_ptr<A>(), *cm = col_max.const_data_ptr<A>();
    const A *cl = col_log.const_data_ptr<A>(), *ct = col_target.const_data_ptr<A>();
    A* terms = out.mutable_data_ptr<A>();
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      A term = (rm[i] - rt[i]) + rl[i];
      if (both) term = (term + ((cm[i] - ct[i]) + cl[i])) / 2;
      if (each) terms[i] = term;
      total += term;
    }
    if (!each) *terms = A(reduction == "mean" ? total / std::max<int64_t>(n, 1) : total);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> contrast_terms_backward(const Tensor& grad, const Tensor& row_log,
                                                           const std::optional<Tensor>& col_log, bool shared,
                                                           std::string_view reduction) {
  const int64_t n = row_log.size(0), m = col_log ? col_log->size(0) : 0;
  const bool each = reduction == "none";
  TORCH_CHECK_VALUE(grad.dim() == each && (!each || grad.size(0) == n) && grad.scalar_type() == row_log.scalar_type(),
                    "grad: expected the shape and dtype of the result, got ", grad.sizes());
  TORCH_CHECK_VALUE(!col_log || m >= n, "col_log: expected at least ", n, " entries, got ", m);
  Tensor drow = at::empty({n}, row_log.options()), dtarget = at::empty_like(drow);
  Tensor dcol = at::empty({m}, row_log.options());
  AT_DISPATCH_FLOATING_TYPES(row_log.scalar_type(), "contrast_terms_backward", [&] {
    using A = scalar_t;
    const A* above = grad.const_data_ptr<A>();
    const int64_t stride = each ? grad.stride(0) : 0;
    const A share = A(col_log ? 2 : 1) * (reduction == "mean" ? A(std::max<int64_t>(n, 1)) : A(1));
    A *dr = drow.mutable_data_ptr<A>(), *dt = dtarget.mutable_data_ptr<A>(), *dc = dcol.mutable_data_ptr<A>();
    for (int64_t i = 0; i < n; ++i) {
      dr[i] = above[i * stride] / share;
      dt[i] = shared ? -2 * dr[i] : -dr[i];
    }
    if (col_log) std::fill(std::copy_n(dr, n, dc), dc + m, A(0));
  });
  return {drow, dtarget, dcol};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("contrast_terms", contrast_terms);
  library.impl("contrast_terms_backward", contrast_terms_backward);
  library.impl("hinge_terms", hinge_terms);
  library.impl("hinge_terms_backward", hinge_terms_backward);
}

}  // namespace gssf
