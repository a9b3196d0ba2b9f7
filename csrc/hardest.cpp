// gssf::hardest_negatives and gssf::relative_negatives on the CPU: the reducing sweep with either epilogue.
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "epilogues.h"

namespace gssf {
namespace {

using at::Tensor;

// Ids as 0, 1, 2, … in order of value, so that they compare in the lanes of scores. Behind the last
// stand a vector's worth of -1, which no row has.
template <class Lane>
std::pair<std::vector<Lane>, std::vector<Lane>> dense_ids(const Tensor& a_ids, const Tensor& b_ids) {
  const int64_t n = a_ids.numel(), m = b_ids.numel();
  const int64_t *a = a_ids.const_data_ptr<int64_t>(), *b = b_ids.const_data_ptr<int64_t>();
  std::vector<int64_t> values(a, a + n);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  auto rank = [&](int64_t id) {
    const auto found = std::lower_bound(values.begin(), values.end(), id);
    return found != values.end() && *found == id ? static_cast<Lane>(found - values.begin()) : Lane(-1);
  };
  std::pair<std::vector<Lane>, std::vector<Lane>> out{std::vector<Lane>(n), std::vector<Lane>(m + 64, Lane(-1))};
  std::transform(a, a + n, out.first.begin(), rank);
  std::transform(b, b + m, out.second.begin(), rank);
  return out;
}

void check(const char* name, const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids,
           const std::optional<Tensor>& b_ids) {
  const int64_t n = a.size(0), m = b.size(0);
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && m >= n &&
                        a.scalar_type() == b.scalar_type() && at::isFloatingType(a.scalar_type()),
                    name, ": expected a [N, D] and b [M, D] of one floating dtype with M >= N, got ", a.sizes(),
                    " and ", b.sizes());
  TORCH_CHECK_VALUE(a_ids.has_value() == b_ids.has_value() && (!a_ids || (a_ids->numel() == n && b_ids->numel() == m)),
                    name, ": expected a_ids [N] and b_ids [M], or neither");
}

// What the sweep for hardest negatives gives, as it is where nothing has been seen.
struct Hardest {
  Tensor pair_score, row_score, row_index, col_score, col_index;

  Hardest(int64_t n, int64_t m, const at::TensorOptions& score) {
    const auto index = score.dtype(at::kLong);
    constexpr double none = -std::numeric_limits<double>::infinity();
    pair_score = at::empty({n}, score);
    row_score = at::full({n}, none, score), row_index = at::full({n}, -1, index);
    col_score = at::full({m}, none, score), col_index = at::full({m}, -1, index);
  }

  template <class A>
  static Best<A> best(Tensor& score, Tensor& index) {
    return {score.mutable_data_ptr<A>(), index.mutable_data_ptr<int64_t>()};
  }
};

// Whether both are the same numbers in the same place.
bool same(const Tensor& x, const Tensor& y) {
  return x.const_data_ptr() == y.const_data_ptr() && x.sizes() == y.sizes() && x.strides() == y.strides();
}

// Rows and columns of a symmetric s, of which tiles on and above the diagonal were seen: a line's best is the better
// of its row's and its column's, at equal scores that of the lower index, and of NaNs the first.
template <class A>
void merge_halves(const Best<A>& rows, const Best<A>& cols, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    A &row = rows.score[i], &col = cols.score[i];
    int64_t &row_index = rows.index[i], &col_index = cols.index[i];
    const bool tie = row == col || (row != row && col != col);
    if (tie ? col_index >= 0 && col_index < row_index : displaces(col, row)) row = col, row_index = col_index;
    else col = row, col_index = row_index;
  }
}

// Sweeps a and b, in A, with the epilogue that `extended` makes of HardestNegatives<A>, and returns that.
template <class A, class Extend>
auto run(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids,
         Hardest& out, Extend extended, bool half = false) {
  using Lane = typename Simd<A>::Lane;
  std::pair<std::vector<Lane>, std::vector<Lane>> ids;
  if (a_ids) ids = dense_ids<Lane>(a_ids->contiguous(), b_ids->contiguous());
  const Blocks rows(a.size(0), kTileMost), cols(b.size(0), tile_cols(b.size(0)));
  auto epilogue = extended(HardestNegatives<A>(ids.first, ids.second, out.pair_score.mutable_data_ptr<A>(),
                                               Hardest::best<A>(out.row_score, out.row_index),
                                               Hardest::best<A>(out.col_score, out.col_index)));
  sweep<A>(a, b, rows, cols, epilogue, half);
  return epilogue;
}

// f(A()) for the type A of the scores of a.
template <class F>
void dispatch(const Tensor& a, F f) {
  if (a.scalar_type() == at::kDouble) f(double());
  else f(float());
}

at::TensorOptions score_options(const Tensor& a) {
  return a.options().dtype(a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives(const Tensor& a, const Tensor& b,
                                                                     const std::optional<Tensor>& a_ids,
                                                                     const std::optional<Tensor>& b_ids) {
  check("gssf::hardest_negatives", a, b, a_ids, b_ids);
  const int64_t n = a.size(0), m = b.size(0);
  Hardest out(n, m, score_options(a));
  if (n > 0)
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      const bool half = same(a, b) && (!a_ids || same(*a_ids, *b_ids));
      const auto found =
          run<A>(a, b, a_ids, b_ids, out, [](const HardestNegatives<A>& hardest) { return hardest; }, half);
      if (half) merge_halves(found.rows(), found.cols(), n);
    });
  return {out.pair_score, out.row_score, out.row_index, out.col_score, out.col_index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> relative_negatives(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids,
    const Tensor& threshold, std::optional<double> beta) {
  check("gssf::relative_negatives", a, b, a_ids, b_ids);
  TORCH_CHECK_VALUE(threshold.dim() == 0, "gssf::relative_negatives: expected a 0-d threshold, got ",
                    threshold.sizes());
  const int64_t n = a.size(0), m = b.size(0);
  Hardest out(n, m, score_options(a));
  Tensor row_relative = at::zeros({n}, score_options(a)), col_relative = at::zeros({m}, score_options(a));
  if (n > 0)
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      const auto epilogue = run<A>(a, b, a_ids, b_ids, out, [&](const HardestNegatives<A>& hardest) {
        return RelativeNegatives<A>(hardest, n, m, threshold.item<A>(), beta);
      });
      epilogue.finish(row_relative.mutable_data_ptr<A>(), col_relative.mutable_data_ptr<A>());
    });
  return {out.pair_score, out.row_score, out.row_index, out.col_score, out.col_index, row_relative, col_relative};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("hardest_negatives", hardest_negatives);
  library.impl("relative_negatives", relative_negatives);
}

}  // namespace gssf
