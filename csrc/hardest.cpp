// gssf::hardest_negatives and gssf::relative_negatives on the CPU: the sweep with either epilogue.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "certified.h"
#include "exact.h"
#include "ids.h"

namespace gssf {
namespace {

using at::Tensor;

// The op's arguments that say which scores are negatives, and whether columns are anchors. See `Negatives`.
struct Arguments {
  const std::optional<Tensor>&a_ids, &b_ids;
  bool paired, columns;
  const std::optional<Tensor>&pair_starts, &pair_cols, &row_limit, &col_limit;
  bool known_symmetric = false;  // the caller says that a bᵀ is symmetric

  void check(const char* name, const Tensor& a, const Tensor& b) const {
    const int64_t n = a.size(0), m = b.size(0);
    TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && (m >= n || !paired) &&
                          a.scalar_type() == b.scalar_type() && at::isFloatingType(a.scalar_type()),
                      name, ": expected a [N, D] and b [M, D] of one floating dtype, with M >= N if paired, got ",
                      a.sizes(), " and ", b.sizes());
    const auto both = [](const auto& x, const auto& y, int64_t x_size, int64_t y_size) {
      return x.has_value() == y.has_value() && (!x || (x->numel() == x_size && (y_size < 0 || y->numel() == y_size)));
    };
    TORCH_CHECK_VALUE(both(a_ids, b_ids, n, m), name, ": expected a_ids [N] and b_ids [M], or neither");
    TORCH_CHECK_VALUE(both(pair_starts, pair_cols, n + 1, -1) && !(paired && pair_starts), name,
                      ": expected pair_starts [N + 1] and pair_cols, or neither, and neither if paired");
    const auto limits_each = [&](const std::optional<Tensor>& limit, int64_t anchors) {
      return !limit || (limit->dim() > 0 && limit->size(-1) == anchors &&
                        (limit->dim() == 1 || (limit->dim() == 2 && limit->size(0) == limits())));
    };
    TORCH_CHECK_VALUE(limits_each(row_limit, n) && limits_each(col_limit, m) && limits() > 0, name,
                      ": expected row_limit [N] and col_limit [M], or [K, N] and [K, M]");
    TORCH_CHECK_VALUE(!several_limits() || (row_limit && (col_limit || !columns)), name,
                      ": expected limits of rows and of columns, if there are several for each");
    if (!pair_starts) return;
    const Tensor starts = pair_starts->contiguous(), cols = pair_cols->contiguous();
    const int64_t *s = starts.const_data_ptr<int64_t>(), *c = cols.const_data_ptr<int64_t>(), pairs = cols.numel();
    bool valid = s[0] == 0 && s[n] == pairs;
    for (int64_t i = 0; i < n; ++i) valid = valid && s[i] <= s[i + 1];
    for (int64_t e = 0; e < pairs; ++e) valid = valid && c[e] >= 0 && c[e] < m;
    TORCH_CHECK_VALUE(valid, name, ": expected pair_starts from 0 to P, ascending, and pair_cols in 0..M-1");
  }

  bool several_limits() const { return (row_limit && row_limit->dim() > 1) || (col_limit && col_limit->dim() > 1); }
  // K, how many limits there are for each anchor.
  int64_t limits() const { return !several_limits() ? 1 : row_limit && row_limit->dim() > 1 ? row_limit->size(0) : -1; }
  // How many positive scores there are.
  int64_t positives(int64_t n) const { return paired ? n : pair_cols ? pair_cols->numel() : 0; }
  // Whether s is symmetric and the same scores of it count for its rows and for its columns.
  bool symmetric(const Tensor& a, const Tensor& b) const {
    return (known_symmetric || same(a, b)) && (!a_ids || same(*a_ids, *b_ids)) && !pair_starts && !row_limit &&
           !col_limit;
  }
};

// The results of a sweep for hardest negatives, initialised to those of no scores.
struct Hardest {
  Tensor positive_score, row_score, row_index, col_score, col_index;

  Hardest(at::IntArrayRef n, at::IntArrayRef m, int64_t positives, const at::TensorOptions& score) {
    const auto index = score.dtype(at::kLong);
    constexpr double none = -std::numeric_limits<double>::infinity();
    positive_score = at::empty({positives}, score);
    row_score = at::full(n, none, score), row_index = at::full(n, -1, index);
    col_score = at::full(m, none, score), col_index = at::full(m, -1, index);
  }

  template <class A>
  static RunningMaxima<A> maxima(Tensor& score, Tensor& index) {
    return {score.mutable_data_ptr<A>(), index.mutable_data_ptr<int64_t>()};
  }
};

// For a symmetric s, of which only the upper triangle was computed: the maximum of row i and column i is the larger of
// the two; at equal scores, or if both are NaN, that of the lower index.
template <class A>
void merge_symmetric(const RunningMaxima<A>& rows, const RunningMaxima<A>& cols, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    A &row = rows.score[i], &col = cols.score[i];
    int64_t &row_index = rows.index[i], &col_index = cols.index[i];
    const bool tie = row == col || (row != row && col != col);
    if (tie ? col_index >= 0 && col_index < row_index : displaces(col, row)) row = col, row_index = col_index;
    else col = row, col_index = row_index;
  }
}

// Limits of anchors in A, and kLimitPadding times +inf behind those of all; empty without limits. A wider score exceeds
// a limit of fp32 if it does so when rounded: if it is nearer to the next number.
template <class A>
std::vector<A> limits_of(const std::optional<Tensor>& t) {
  std::vector<A> out;
  if (!t) return out;
  const Tensor values = at::constant_pad_nd(t->to(c10::CppTypeToScalarType<A>::value), {0, kLimitPadding},
                                            std::numeric_limits<A>::infinity())
                            .contiguous();
  out.assign(values.const_data_ptr<A>(), values.const_data_ptr<A>() + values.numel());
  if (t->scalar_type() == at::kFloat && std::is_same_v<A, double>)
    for (A& limit : out)
      if (std::isfinite(limit))
        limit += (std::nextafter(static_cast<float>(limit), std::numeric_limits<float>::infinity()) - limit) / 2;
  return out;
}

// Sweeps a and b with scores in A and the epilogue extended(HardestNegatives<A>), and returns that epilogue.
template <class A, class Extend>
auto run(const Tensor& a, const Tensor& b, const Arguments& of, Hardest& out, Extend extended, bool symmetric = false) {
  using Lane = typename Simd<A>::Lane;
  std::pair<std::vector<Lane>, std::vector<Lane>> ids;
  if (of.a_ids) ids = dense_ids<Lane>(of.a_ids->contiguous(), of.b_ids->contiguous());
  const Blocks rows(a.size(0), kTileMost), cols(b.size(0), tile_cols(b.size(0)));
  const std::vector<A> row_limit = limits_of<A>(of.row_limit), col_limit = limits_of<A>(of.col_limit);
  const Tensor starts = of.pair_starts ? of.pair_starts->contiguous() : Tensor();
  const Tensor pairs = of.pair_cols ? of.pair_cols->contiguous() : Tensor();
  const Negatives<A> negatives{
      of.paired,
      of.columns || symmetric,
      starts.defined() ? starts.const_data_ptr<int64_t>() : nullptr,
      pairs.defined() ? pairs.const_data_ptr<int64_t>() : nullptr,
      {row_limit.empty() ? nullptr : row_limit.data(), col_limit.empty() ? nullptr : col_limit.data()},
      out.positive_score.mutable_data_ptr<A>()};
  auto epilogue =
      extended(HardestNegatives<A>(ids.first, ids.second, negatives, Hardest::maxima<A>(out.row_score, out.row_index),
                                   Hardest::maxima<A>(out.col_score, out.col_index)));
  const int64_t slots = std::max<int64_t>(kSlotsPerThread / of.limits(), 1);  // each with partials for every limit
  if constexpr (std::is_same_v<A, float>) {
    if (rounds(a)) {
      sweep(Bf16Panels(a, b), rows, cols, epilogue, symmetric, slots);
      return epilogue;
    }
  }
  sweep(Panels<A>(a, b), rows, cols, epilogue, symmetric, slots);
  return epilogue;
}

// s_ij at (i, j) = index(0), …, index(count - 1), in fp64; a and b are both fp32 or both fp16.
template <class Index>
std::vector<double> exact_scores(const Tensor& a, const Tensor& b, int64_t count, Index index) {
  RECORD_FUNCTION("gssf::stage::rescore", {});
  std::vector<double> out(count);
  const Tensor x = a.contiguous(), y = b.contiguous();
  const int64_t depth = x.size(1);
  const auto run = [&](const auto* p, const auto* q) {
    at::parallel_for(0, count, ceil_div(1 << 14, std::max<int64_t>(depth, 1)), [&](int64_t k, int64_t end) {
      for (; k < end; ++k) {
        const auto [i, j] = index(k);
        const auto [next_i, next_j] = index(std::min(k + 1, end - 1));
        out[k] =
            GSSF_VECTORIZED(exact_dot_of, p + i * depth, q + j * depth, depth, p + next_i * depth, q + next_j * depth);
      }
    });
  };
  if (a.scalar_type() == at::kFloat) run(x.const_data_ptr<float>(), y.const_data_ptr<float>());
  else run(x.const_data_ptr<at::Half>(), y.const_data_ptr<at::Half>());
  return out;
}

// The hardest negatives of the exact scores of fp32 or fp16 inputs. Returns how many scores were computed in fp64: all
// of them where the bound drops too few.
int64_t certified(const Tensor& a, const Tensor& b, const Arguments& of, bool symmetric, Hardest& out) {
  const int64_t n = a.size(0), m = b.size(0), positives = of.positives(n);
  std::pair<std::vector<int32_t>, std::vector<int32_t>> ids;
  if (of.a_ids) ids = dense_ids<int32_t>(of.a_ids->contiguous(), of.b_ids->contiguous());
  const Blocks rows(n, kTileMost), cols(m, tile_cols(m));
  const Bf16Panels factors(a, b);
  const std::vector<float> row_limit = limits_of<float>(of.row_limit), col_limit = limits_of<float>(of.col_limit);
  const Limits<float> limits{row_limit.empty() ? nullptr : row_limit.data(),
                             col_limit.empty() ? nullptr : col_limit.data()};
  Candidates candidates(factors, rows, cols, ids.first, ids.second, of.paired, of.columns || symmetric, limits);
  if (!candidates.given_up()) sweep(factors, rows, cols, candidates, symmetric);
  if (candidates.given_up()) {
    Hardest wide(n, out.col_score.numel(), positives, a.options().dtype(at::kDouble));
    const auto epilogue = run<double>(
        a.to(at::kDouble), b.to(at::kDouble), of, wide, [](const HardestNegatives<double>& hardest) { return hardest; },
        symmetric);
    if (symmetric) merge_symmetric(epilogue.rows(), epilogue.cols(), n);
    for (auto [to, from] : {std::pair{&out.positive_score, &wide.positive_score},
                            {&out.row_score, &wide.row_score},
                            {&out.row_index, &wide.row_index},
                            {&out.col_score, &wide.col_score},
                            {&out.col_index, &wide.col_index}})
      to->copy_(*from);
    return n * m;
  }
  const auto& left = candidates.left();
  const auto count = static_cast<int64_t>(left.size());
  const auto scores = exact_scores(a, b, count + positives, [&](int64_t k) {
    return k < count ? std::pair<int64_t, int64_t>(left[k].i, left[k].j) : std::pair(k - count, k - count);
  });
  std::vector<ExactMaximum> row(n), col(m);
  for (int64_t k = 0; k < count; ++k) {
    const auto [i, j, rounded] = left[k];
    const auto score = static_cast<float>(scores[k]);  // limits are made of scores that are rounded
    if (!limits.rows || !(score > limits.rows[i])) row[i].add(scores[k], j);
    if (!limits.cols || !(score > limits.cols[j])) col[j].add(scores[k], i);
  }
  for (int64_t i = 0; i < n && symmetric; ++i) {
    row[i].add(col[i].score, col[i].index);
    col[i] = row[i];
  }
  const auto write = [](const std::vector<ExactMaximum>& from, const RunningMaxima<float>& to) {
    for (size_t k = 0; k < from.size(); ++k)
      to.score[k] = static_cast<float>(from[k].score), to.index[k] = from[k].index;
  };
  write(row, Hardest::maxima<float>(out.row_score, out.row_index));
  if (out.col_score.numel() > 0) write(col, Hardest::maxima<float>(out.col_score, out.col_index));
  std::copy(scores.begin() + count, scores.end(), out.positive_score.mutable_data_ptr<float>());
  return count;
}

// The number of scores from which certified mining is faster. (That for AMX is not yet measured.)
constexpr int64_t certified_least(Bf16Unit unit) { return unit == Bf16Unit::amx ? 1 << 18 : 1 << 20; }

// (positive_score, row_score, row_index, col_score, col_index, rescored). route: "sweep", "certified", or "" for the
// faster. rescored: with "certified" how many scores were computed in fp64, else empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids,
    std::string_view route, bool paired, bool columns, const std::optional<Tensor>& pair_starts,
    const std::optional<Tensor>& pair_cols, const std::optional<Tensor>& row_limit,
    const std::optional<Tensor>& col_limit, bool known_symmetric = false) {
  const Arguments of{a_ids, b_ids, paired, columns, pair_starts, pair_cols, row_limit, col_limit, known_symmetric};
  of.check("gssf::hardest_negatives", a, b);
  TORCH_CHECK_VALUE(!known_symmetric || a.size(0) == b.size(0), "symmetric: expected as many rows of a as of b, got ",
                    a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(route.empty() || route == "sweep" || route == "certified",
                    "route: expected \"\", \"sweep\" or \"certified\", got ", route);
  const int64_t n = a.size(0), m = b.size(0);
  const bool symmetric = of.symmetric(a, b), any = n > 0 && m > 0;
  const auto shape = [&](int64_t anchors) {
    return of.several_limits() ? std::vector<int64_t>{of.limits(), anchors} : std::vector<int64_t>{anchors};
  };
  Hardest out(shape(n), columns || symmetric ? shape(m) : std::vector<int64_t>{0}, of.positives(n), score_options(a));
  Tensor rescored = at::empty({0}, a.options().dtype(at::kLong));
  if (route == "certified") {
    TORCH_CHECK_VALUE((a.scalar_type() == at::kFloat || a.scalar_type() == at::kHalf) && bf16_unit() != Bf16Unit::none,
                      "route: certified mining takes float32 or float16 and a processor with a bf16 unit");
    TORCH_CHECK_VALUE(!pair_starts && !of.several_limits(),
                      "route: certified mining takes no listed pairs, and one limit for each anchor");
    rescored = at::zeros({}, rescored.options());
    if (any) rescored.fill_(certified(a, b, of, symmetric, out));
  } else if (route.empty() && any && !pair_starts && !of.several_limits() && certifies(a, b)) {
    certified(a, b, of, symmetric, out);
  } else if (any && of.several_limits()) {
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      run<A>(a, b, of, out,
             [&](const HardestNegatives<A>& first) { return HardestByLimit<A>(first, of.limits(), n, m); });
    });
  } else if (any) {
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      const auto epilogue =
          run<A>(a, b, of, out, [](const HardestNegatives<A>& hardest) { return hardest; }, symmetric);
      if (symmetric) merge_symmetric(epilogue.rows(), epilogue.cols(), n);
    });
  }
  if (!columns) out.col_score = at::empty({0}, out.col_score.options());
  if (!columns) out.col_index = at::empty({0}, out.col_index.options());
  return {out.positive_score, out.row_score, out.row_index, out.col_score, out.col_index, rescored};
}

// The same of each of a graph's edges, (left, right) [E, 2]: of the rows a[left] and b[right] of a [L, N, D] and b
// [R, M, D]. Limits are [E, N] and [E, M], and results have a leading dimension E.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hardest_of_edges(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids,
    std::string_view route, bool paired, bool columns, const std::optional<Tensor>& pair_starts,
    const std::optional<Tensor>& pair_cols, const std::optional<Tensor>& row_limit,
    const std::optional<Tensor>& col_limit, const std::optional<Tensor>& edges, bool symmetric) {
  if (!edges)
    return hardest_negatives(a, b, a_ids, b_ids, route, paired, columns, pair_starts, pair_cols, row_limit, col_limit,
                             symmetric);
  const int64_t count = edges->size(0);
  TORCH_CHECK_VALUE(a.dim() == 3 && b.dim() == 3 && edges->dim() == 2 && edges->size(1) == 2 && paired && columns &&
                        route != "certified" && edges->scalar_type() == at::kLong,
                    "gssf::hardest_negatives: expected a [L, N, D], b [R, M, D] and edges [E, 2] with pairs (i, i)");
  const auto limit_of = [&](const std::optional<Tensor>& limit, int64_t anchors, int64_t e) {
    TORCH_CHECK_VALUE(!limit || (limit->dim() == 2 && limit->size(0) == count && limit->size(1) == anchors),
                      "gssf::hardest_negatives: expected limits [E, N] and [E, M]");
    return limit ? std::optional(limit->select(0, e)) : std::nullopt;
  };
  const Tensor nodes = edges->contiguous();
  const int64_t* ends = nodes.const_data_ptr<int64_t>();
  const int64_t n = a.size(1), m = b.size(1);
  const auto score = score_options(a), index = score.dtype(at::kLong);
  std::array<Tensor, 5> out{at::empty({count, n}, score), at::empty({count, n}, score), at::empty({count, n}, index),
                            at::empty({count, m}, score), at::empty({count, m}, index)};
  for (int64_t e = 0; e < count; ++e) {
    const int64_t left = ends[2 * e], right = ends[2 * e + 1];
    TORCH_CHECK_VALUE(left >= 0 && left < a.size(0) && right >= 0 && right < b.size(0),
                      "gssf::hardest_negatives: expected edges within 0..L-1 and 0..R-1, got (", left, ", ", right,
                      ")");
    const auto [p, row, row_index, col, col_index, rescored] =
        hardest_negatives(a.select(0, left), b.select(0, right), a_ids, b_ids, route, paired, columns, {}, {},
                          limit_of(row_limit, n, e), limit_of(col_limit, m, e));
    const std::array<const Tensor*, 5> results{&p, &row, &row_index, &col, &col_index};
    for (size_t k = 0; k < out.size(); ++k) out[k].select(0, e).copy_(*results[k]);
  }
  return {out[0], out[1], out[2], out[3], out[4], at::empty({0}, index)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> relative_negatives(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids,
    const Tensor& threshold, std::optional<double> beta, bool paired, bool columns,
    const std::optional<Tensor>& pair_starts, const std::optional<Tensor>& pair_cols,
    const std::optional<Tensor>& row_limit, const std::optional<Tensor>& col_limit) {
  const Arguments of{a_ids, b_ids, paired, columns, pair_starts, pair_cols, row_limit, col_limit};
  of.check("gssf::relative_negatives", a, b);
  TORCH_CHECK_VALUE(!of.several_limits(), "gssf::relative_negatives: expected one limit for each anchor");
  TORCH_CHECK_VALUE(threshold.dim() == 0, "gssf::relative_negatives: expected a 0-d threshold, got ",
                    threshold.sizes());
  const int64_t n = a.size(0), m = columns ? b.size(0) : 0;
  Hardest out(n, m, of.positives(n), score_options(a));
  Tensor row_relative = at::zeros({n}, score_options(a)), col_relative = at::zeros({m}, score_options(a));
  if (n > 0 && b.size(0) > 0)
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      const auto epilogue = run<A>(a, b, of, out, [&](const HardestNegatives<A>& hardest) {
        return RelativeNegatives<A>(hardest, n, m, threshold.item<A>(), beta);
      });
      epilogue.finish(row_relative.mutable_data_ptr<A>(), col_relative.mutable_data_ptr<A>());
    });
  return {out.positive_score, out.row_score, out.row_index, out.col_score, out.col_index, row_relative, col_relative};
}

}  // namespace

bool certifies(const Tensor& a, const Tensor& b) {
  const bool narrow = a.scalar_type() == at::kFloat || a.scalar_type() == at::kHalf;
  return narrow && bf16_unit() != Bf16Unit::none && !rounds(a) && a.size(0) * b.size(0) >= certified_least(bf16_unit());
}

Tensor exact_pair_scores(const Tensor& a, const Tensor& b, const Tensor& rows, const Tensor& cols) {
  const int64_t *i = rows.const_data_ptr<int64_t>(), *j = cols.const_data_ptr<int64_t>(), count = rows.numel();
  const auto scores = exact_scores(
      a, b, count, [&](int64_t e) { return std::pair(std::max<int64_t>(i[e], 0), std::max<int64_t>(j[e], 0)); });
  Tensor out = at::empty({count}, a.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  for (int64_t e = 0; e < count; ++e)
    to[e] = i[e] < 0 || j[e] < 0 ? -std::numeric_limits<float>::infinity() : static_cast<float>(scores[e]);
  return out;
}

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("hardest_negatives", hardest_of_edges);
  library.impl("relative_negatives", relative_negatives);
}

}  // namespace gssf
