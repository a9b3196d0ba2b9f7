// gssf::anchor_terms and its gradient on the CPU: see gssf_kernels/ops/terms.py.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace gssf {

using at::Tensor;

namespace {

using Statistics = c10::List<std::optional<Tensor>>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// A score function of an anchor's positive score p and hardest negative n. term(p, n): the term of one direction.
// weighted(p, n, g), with g = dL with respect to that term: -dL/dp and dL/dn.
template <class A>
struct Hinge {
  A margin;

  A term(A p, A n) const {
    const A t = margin + n - p;
    return t < 0 ? A(0) : t;  // NaN stays
  }
  std::pair<A, A> weighted(A p, A n, A g) const { return margin + n - p < 0 ? std::pair(A(0), A(0)) : std::pair(g, g); }
};

template <class A>
A sigmoid(A t) {
  return 1 / (1 + std::exp(-t));
}

template <class A>
A softplus(A t) {
  return (t > 0 ? t : A(0)) + std::log1p(std::exp(-std::abs(t)));
}

// Formulas: gssf_kernels/losses/goal.py.
template <class A>
struct Goal {
  enum class Triplet { con, nca, cir } triplet;
  enum class Pair { con, lin, sig } pair;
  A tau, alpha, beta, lam;

  Goal(std::string_view mode, at::ArrayRef<double> constants)
      : tau(A(constants[0])), alpha(A(constants[1])), beta(A(constants[2])), lam(A(constants[3])) {
    const std::string_view first = mode.substr(0, 3), second = mode.substr(std::min<size_t>(4, mode.size()));
    TORCH_CHECK_VALUE(
        (first == "con" || first == "nca" || first == "cir") && (second == "con" || second == "lin" || second == "sig"),
        "formula: no such mode of GOAL: ", mode);
    triplet = first == "con" ? Triplet::con : first == "nca" ? Triplet::nca : Triplet::cir;
    pair = second == "con" ? Pair::con : second == "lin" ? Pair::lin : Pair::sig;
  }

  A term(A p, A n) const {
    if (n == -std::numeric_limits<A>::infinity()) return 0;
    if (triplet == Triplet::con && pair == Pair::lin) return ((1 - p) * (1 - p) + n * n) / 2;
    if (triplet == Triplet::con && pair == Pair::sig)
      return softplus(-alpha * (p - lam)) / alpha + softplus(beta * (n - lam)) / beta;
    if (triplet == Triplet::nca && pair == Pair::con) return softplus(-tau * (p - n)) / tau;
    if (triplet == Triplet::cir && pair == Pair::lin)
      return softplus(tau * ((1 - p) * (1 - p) + n * n - A(0.5))) / (2 * tau);
    return n - p;
  }

  std::pair<A, A> weighted(A p, A n, A g) const {
    if (n == -std::numeric_limits<A>::infinity()) return {g * 0, g * 0};
    A weight = 1, positive_part = 1, negative_part = 1;
    if (triplet == Triplet::nca) weight = sigmoid(-tau * (p - n));
    if (triplet == Triplet::cir) weight = sigmoid(-tau * (p * (2 - p) - n * n - A(0.5)));
    if (pair == Pair::lin) positive_part = 1 - p, negative_part = n;
    if (pair == Pair::sig) positive_part = sigmoid(-alpha * (p - lam)), negative_part = sigmoid(beta * (n - lam));
    return {g * (weight * positive_part), g * (weight * negative_part)};
  }
};

// Calls f(score function) for "hinge" with its margin, or "goal <triplet> <pair>" with τ, α, β and λ.
template <class A, class F>
void with_function(std::string_view formula, at::ArrayRef<double> constants, F f) {
  if (formula == "hinge") {
    TORCH_CHECK_VALUE(constants.size() == 1, "constants: expected the margin, got ", constants.size(), " numbers");
    f(Hinge<A>{A(constants[0])});
  } else {
    TORCH_CHECK_VALUE(formula.substr(0, 5) == "goal ", "formula: no such formula: ", formula);
    TORCH_CHECK_VALUE(constants.size() >= 4, "constants: expected tau, alpha, beta and lam, got ", constants.size(),
                      " numbers");
    f(Goal<A>(formula.substr(5), constants));
  }
}

Tensor statistic(const Statistics& statistics, size_t k, const char* name) {
  const std::optional<Tensor> t = k < statistics.size() ? statistics.get(k) : std::nullopt;
  TORCH_CHECK_VALUE(t, name, ": expected a tensor among the statistics, got none");
  TORCH_CHECK_VALUE(t->dim() == 1, name, ": expected one dimension, got ", t->sizes());
  return t->contiguous();
}

bool has(const Statistics& statistics, size_t k) { return k < statistics.size() && statistics.get(k).has_value(); }

// How terms [N] become the result, and how grad_out becomes their gradients.
struct Reduction {
  bool each, mean;

  explicit Reduction(std::string_view reduction) : each(reduction == "none"), mean(reduction == "mean") {
    TORCH_CHECK_VALUE(each || mean || reduction == "sum", "no such reduction: ", reduction);
  }

  template <class A, class F>
  Tensor terms(int64_t n, const at::TensorOptions& options, F term) const {
    Tensor out = each ? at::empty({n}, options) : at::empty({}, options);
    A* const to = out.mutable_data_ptr<A>();
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A t = term(i);
      if (each) to[i] = t;
      total += t;
    }
    if (!each) *to = A(mean ? total / std::max<int64_t>(n, 1) : total);
    return out;
  }

  // dL with respect to every term, divided by `share`.
  template <class A>
  std::vector<A> gradient(const Tensor& grad_out, int64_t n, const Tensor& like, A share) const {
    TORCH_CHECK_VALUE(
        grad_out.dim() == each && (!each || grad_out.size(0) == n) && grad_out.scalar_type() == like.scalar_type(),
        "grad: expected the shape and dtype of the result, got ", grad_out.sizes());
    const A* const from = grad_out.const_data_ptr<A>();
    const int64_t stride = each ? grad_out.stride(0) : 0;
    if (mean) share *= A(std::max<int64_t>(n, 1));
    std::vector<A> out(n);
    for (int64_t i = 0; i < n; ++i) out[i] = from[i * stride] / share;
    return out;
  }
};

// The statistics of N anchors: positive_score and row_score [N], and col_score [M], of which the first N are used, or
// none of columns.
struct Anchors {
  bool both;
  Tensor positive, row, col;  // without columns, col is row, and not used
  int64_t n, m;

  explicit Anchors(const Statistics& statistics)
      : both(has(statistics, 2)),
        positive(statistic(statistics, 0, "positive_score")),
        row(statistic(statistics, 1, "row_score")),
        col(both ? statistic(statistics, 2, "col_score") : row),
        n(positive.size(0)),
        m(both ? col.size(0) : 0) {
    TORCH_CHECK_VALUE(row.size(0) == n && (m >= n || !both) && row.scalar_type() == positive.scalar_type() &&
                          col.scalar_type() == positive.scalar_type(),
                      "positive_score, row_score, col_score: expected [N], [N] and [M] of one dtype, got ",
                      positive.sizes(), ", ", row.sizes(), " and ", col.sizes());
  }
};

// Row and column log-sums as max + log, and the targets; one target may serve both directions.
struct LogSums {
  Tensor row_log, col_log;
  bool both, shared;
  int64_t n, m = 0;

  explicit LogSums(const Statistics& statistics)
      : row_log(statistic(statistics, 1, "row_log")),
        both(has(statistics, 4)),
        shared(both && !has(statistics, 5)),
        n(row_log.size(0)) {
    if (!both) return;
    col_log = at_least(statistics, 4, "col_log");
    m = col_log.size(0);
  }

  Tensor at_least(const Statistics& statistics, size_t k, const char* name) const {
    const Tensor t = statistic(statistics, k, name);
    TORCH_CHECK_VALUE(t.size(0) >= n && t.scalar_type() == row_log.scalar_type(), name, ": expected at least ", n,
                      " entries of row_log's dtype, got ", t.sizes());
    return t;
  }
};

Tensor info_nce_terms(const Statistics& statistics, const Reduction& how) {
  const LogSums sums(statistics);
  const Tensor row_max = sums.at_least(statistics, 0, "row_max");
  const Tensor row_target = sums.at_least(statistics, 2, "row_target");
  const Tensor col_max = sums.both ? sums.at_least(statistics, 3, "col_max") : row_max;
  const Tensor col_target = sums.both && !sums.shared ? sums.at_least(statistics, 5, "col_target") : row_target;
  return AT_DISPATCH_FLOATING_TYPES(sums.row_log.scalar_type(), "anchor_terms", [&] {
    using A = scalar_t;
    const A *rm = row_max.const_data_ptr<A>(), *rl = sums.row_log.const_data_ptr<A>();
    const A *rt = row_target.const_data_ptr<A>(), *cm = col_max.const_data_ptr<A>();
    const A *cl = sums.both ? sums.col_log.const_data_ptr<A>() : rl, *ct = col_target.const_data_ptr<A>();
    return how.terms<A>(sums.n, sums.row_log.options(), [&](int64_t i) {
      const A term = (rm[i] - rt[i]) + rl[i];
      return sums.both ? (term + ((cm[i] - ct[i]) + cl[i])) / 2 : term;
    });
  });
}

// Gradients of row_log [N], of either target [N], and of col_log [M], empty without columns.
Gradients info_nce_backward(const Tensor& grad_out, const Statistics& statistics, const Reduction& how) {
  const LogSums sums(statistics);
  const Tensor drow = at::empty({sums.n}, sums.row_log.options()), dtarget = at::empty_like(drow);
  const Tensor dcol = at::empty({sums.m}, sums.row_log.options());
  AT_DISPATCH_FLOATING_TYPES(sums.row_log.scalar_type(), "anchor_terms_backward", [&] {
    using A = scalar_t;
    const std::vector<A> g = how.gradient<A>(grad_out, sums.n, sums.row_log, A(sums.both ? 2 : 1));
    A *dr = drow.mutable_data_ptr<A>(), *dt = dtarget.mutable_data_ptr<A>(), *dc = dcol.mutable_data_ptr<A>();
    for (int64_t i = 0; i < sums.n; ++i) dr[i] = g[i], dt[i] = sums.shared ? -2 * g[i] : -g[i];
    if (sums.both) std::fill(std::copy_n(dr, sums.n, dc), dc + sums.m, A(0));
  });
  return {drow, dtarget, dcol};
}

// Gradients by weights [4, N]: of the rows' positives and negatives, then of the columns'. The second statistic, of M
// entries, gives M.
Gradients weights_backward(const Tensor& grad_out, const Statistics& statistics, const Reduction& how) {
  TORCH_CHECK_VALUE(statistics.size() == 2 && has(statistics, 0) && has(statistics, 1) &&
                        statistics.get(0)->dim() == 2 && statistics.get(0)->size(0) == 4,
                    "statistics: expected weights [4, N] and a vector of M entries");
  const Tensor weights = statistics.get(0)->contiguous();
  const int64_t n = weights.size(1), m = statistics.get(1)->numel();
  TORCH_CHECK_VALUE(m >= n, "statistics: expected at least ", n, " columns, got ", m);
  const Tensor dpositive = at::empty({n}, weights.options()), drow = at::empty({n}, weights.options());
  const Tensor dcol = at::empty({m}, weights.options());
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "anchor_terms_backward", [&] {
    using A = scalar_t;
    const std::vector<A> g = how.gradient<A>(grad_out, n, weights, A(1));
    const A* const w = weights.const_data_ptr<A>();
    A *dp = dpositive.mutable_data_ptr<A>(), *dr = drow.mutable_data_ptr<A>(), *dc = dcol.mutable_data_ptr<A>();
    for (int64_t i = 0; i < n; ++i) {
      dr[i] = g[i] * w[n + i];
      dc[i] = g[i] * w[3 * n + i];
      dp[i] = -(g[i] * w[i] + g[i] * w[2 * n + i]);
    }
    std::fill(dc + n, dc + m, A(0));
  });
  return {dpositive, drow, dcol};
}

Tensor anchor_terms(std::string_view formula, const Statistics& statistics, at::ArrayRef<double> constants,
                    std::string_view reduction) {
  const Reduction how(reduction);
  if (formula == "info_nce") return info_nce_terms(statistics, how);
  const Anchors anchors(statistics);
  Tensor out;
  AT_DISPATCH_FLOATING_TYPES(anchors.positive.scalar_type(), "anchor_terms", [&] {
    using A = scalar_t;
    const A *p = anchors.positive.const_data_ptr<A>(), *row = anchors.row.const_data_ptr<A>();
    const A* col = anchors.col.const_data_ptr<A>();
    with_function<A>(formula, constants, [&](const auto& function) {
      out = how.terms<A>(anchors.n, anchors.positive.options(), [&](int64_t i) {
        const A term = function.term(p[i], row[i]);
        return anchors.both ? term + function.term(p[i], col[i]) : term;
      });
    });
  });
  return out;
}

Gradients anchor_terms_backward(const Tensor& grad_out, std::string_view formula, const Statistics& statistics,
                                at::ArrayRef<double> constants, std::string_view reduction) {
  const Reduction how(reduction);
  if (formula == "info_nce") return info_nce_backward(grad_out, statistics, how);
  if (formula == "weights") return weights_backward(grad_out, statistics, how);
  const Anchors anchors(statistics);
  const Tensor dpositive = at::empty_like(anchors.positive), drow = at::empty_like(anchors.row);
  const Tensor dcol = at::empty({anchors.m}, anchors.row.options());
  AT_DISPATCH_FLOATING_TYPES(anchors.positive.scalar_type(), "anchor_terms_backward", [&] {
    using A = scalar_t;
    const A *p = anchors.positive.const_data_ptr<A>(), *row = anchors.row.const_data_ptr<A>();
    const A* col = anchors.col.const_data_ptr<A>();
    const std::vector<A> g = how.gradient<A>(grad_out, anchors.n, anchors.positive, A(1));
    A *dp = dpositive.mutable_data_ptr<A>(), *dr = drow.mutable_data_ptr<A>(), *dc = dcol.mutable_data_ptr<A>();
    with_function<A>(formula, constants, [&](const auto& function) {
      for (int64_t i = 0; i < anchors.n; ++i) {
        const auto [row_positive, row_negative] = function.weighted(p[i], row[i], g[i]);
        dp[i] = -row_positive;
        dr[i] = row_negative;
        if (!anchors.both) continue;
        const auto [col_positive, col_negative] = function.weighted(p[i], col[i], g[i]);
        dp[i] = -(row_positive + col_positive);
        dc[i] = col_negative;
      }
    });
    if (anchors.both) std::fill(dc + anchors.n, dc + anchors.m, A(0));
  });
  return {dpositive, drow, dcol};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("anchor_terms", anchor_terms);
  library.impl("anchor_terms_backward", anchor_terms_backward);
}

}  // namespace gssf
