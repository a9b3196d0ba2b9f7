// gssf::top_scores on the CPU: the k best scores of every row of s = a bᵀ, and of every column.
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "best.h"
#include "exact.h"
#include "ids.h"

namespace gssf {
namespace {

using at::Tensor;

struct Search {
  const Tensor &a, &b;
  int64_t k;
  const std::optional<Tensor>&a_ids, &b_ids;
  bool self;
  const std::optional<Tensor>& limit;  // [N], contiguous, of the scores' dtype
  bool columns;
};

struct Results {
  Tensor values, indices, col_values, col_indices;
};

// Runs f(anchor) for every anchor, in parallel.
template <class F>
void for_each_anchor(int64_t anchors, const F& f) {
  at::parallel_for(0, anchors, 64, [&](int64_t begin, int64_t end) {
    for (int64_t anchor = begin; anchor < end; ++anchor) f(anchor);
  });
}

template <class A>
void write(BestOfAnchors<A>& best, const Tensor& values, const Tensor& indices) {
  RECORD_FUNCTION("gssf::stage::sort", {});
  A* value = values.mutable_data_ptr<A>();
  int64_t* index = indices.mutable_data_ptr<int64_t>();
  const int64_t k = values.size(1);
  for_each_anchor(best.anchors(), [&](int64_t anchor) { best.write(anchor, value + anchor * k, index + anchor * k); });
}

template <class A>
Results sweep_for(const Search& of) {
  using Lane = typename Simd<A>::Lane;
  const int64_t n = of.a.size(0), m = of.b.size(0);
  std::pair<std::vector<Lane>, std::vector<Lane>> ids;
  if (of.a_ids) ids = dense_ids<Lane>(of.a_ids->contiguous(), of.b_ids->contiguous());
  const Blocks rows(n, kTileMost);
  BestOfAnchors<A> of_rows(n, of.k), of_cols(of.columns ? m : 0, of.k);
  BestScores<A> epilogue({ids.first, ids.second, of.self}, of.limit ? of.limit->const_data_ptr<A>() : nullptr, of_rows,
                         of.columns ? &of_cols : nullptr);
  bool narrow = false;
  if constexpr (std::is_same_v<A, float>) narrow = rounds(of.a);
  const Tensor a = narrow ? of.a : of.a.to(c10::CppTypeToScalarType<A>::value).contiguous();
  Tensor panels;
  for_each_chunk(of.b, narrow ? 2 : sizeof(A), [&](int64_t first, const Tensor& b) {
    const Blocks cols(b.size(0), tile_cols(b.size(0)));
    epilogue.begin(first);
    if constexpr (std::is_same_v<A, float>) {
      if (narrow) return sweep(Bf16Panels(a, b), rows, cols, epilogue);
    }
    sweep(Panels<A>(a, b, &panels), rows, cols, epilogue);
  });
  const auto score = of.a.options().dtype(c10::CppTypeToScalarType<A>::value), index = score.dtype(at::kLong);
  Results out{at::empty({n, of.k}, score), at::empty({n, of.k}, index), at::empty({of_cols.anchors(), of.k}, score),
              at::empty({of_cols.anchors(), of.k}, index)};
  write(of_rows, out.values, out.indices);
  write(of_cols, out.col_values, out.col_indices);
  return out;
}

// The k best of an anchor's candidates by their exact scores, computed in fp64 and rounded; returns their number. x:
// the anchor's row, others: the rows of the candidates.
template <class T>
int64_t exact_best(CandidatesOfAnchors& candidates, int64_t anchor, const T* x, const T* others, int64_t depth,
                   const float* limit, const float* limits, int64_t k, float* values, int64_t* indices) {
  const auto& left = candidates.left(anchor);
  const auto count = static_cast<int64_t>(left.size());
  std::vector<Scored<double>> exact;
  exact.reserve(count);
  for (int64_t c = 0; c < count; ++c) {
    const T *y = others + left[c].index * depth, *next = others + left[std::min(c + 1, count - 1)].index * depth;
    const double score = GSSF_VECTORIZED(exact_dot_of, x, y, depth, x, next);
    const float* most = limit ? limit : limits ? limits + left[c].index : nullptr;
    if (!most || !(static_cast<float>(score) > *most)) exact.push_back({score, left[c].index});
  }
  const auto last = exact.begin() + std::min<int64_t>(k, exact.size());
  std::partial_sort(exact.begin(), last, exact.end(), before<double>);
  for (int64_t c = 0; c < k; ++c) {
    const bool any = c < last - exact.begin();
    values[c] = any ? static_cast<float>(exact[c].score) : -std::numeric_limits<float>::infinity();
    indices[c] = any ? exact[c].index : -1;
  }
  candidates.drop(anchor);
  return count;
}

// The k best of the exact scores of fp32 or fp16 inputs, and how many scores were computed in fp64: all of them where
// the bound drops too few.
std::pair<Results, int64_t> certified(const Search& of) {
  const int64_t n = of.a.size(0), m = of.b.size(0), depth = of.a.size(1);
  std::pair<std::vector<int32_t>, std::vector<int32_t>> ids;
  if (of.a_ids) ids = dense_ids<int32_t>(of.a_ids->contiguous(), of.b_ids->contiguous());
  const Blocks rows(n, kTileMost);
  CandidatesOfAnchors of_rows(n, of.k), of_cols(of.columns ? m : 0, of.k);
  const float* limit = of.limit ? of.limit->const_data_ptr<float>() : nullptr;
  bool given_up = false;
  for_each_chunk(of.b, 2, [&](int64_t first, const Tensor& b) {
    if (given_up) return;
    const Blocks cols(b.size(0), tile_cols(b.size(0)));
    const Bf16Panels factors(of.a, b);
    BestCandidates epilogue(factors, rows, cols, {ids.first, ids.second, of.self}, limit, of_rows,
                            of.columns ? &of_cols : nullptr, first);
    if (!epilogue.given_up()) sweep(factors, rows, cols, epilogue);
    given_up = epilogue.given_up();
  });
  const auto score = score_options(of.a), index = score.dtype(at::kLong);
  if (given_up) {
    const Tensor a = of.a.to(at::kDouble), b = of.b.to(at::kDouble);
    // A limit of fp32 is exceeded by what rounds to a greater number: what is above the middle to the next one.
    std::optional<Tensor> wide;
    if (of.limit) {
      wide = of.limit->to(at::kDouble);
      double* const data = wide->mutable_data_ptr<double>();
      for (int64_t i = 0; i < n; ++i)
        if (std::isfinite(limit[i])) data[i] += (std::nextafter(limit[i], INFINITY) - data[i]) / 2;
    }
    Results out = sweep_for<double>({a, b, of.k, of.a_ids, of.b_ids, of.self, wide, of.columns});
    return {{out.values.to(at::kFloat), out.indices, out.col_values.to(at::kFloat), out.col_indices}, n * m};
  }
  Results out{at::empty({n, of.k}, score), at::empty({n, of.k}, index), at::empty({of_cols.anchors(), of.k}, score),
              at::empty({of_cols.anchors(), of.k}, index)};
  RECORD_FUNCTION("gssf::stage::rescore", {});
  std::atomic<int64_t> rescored{0};
  const Tensor a = of.a.contiguous(), b = of.b.contiguous();
  const auto rescore = [&](const auto* x, const auto* y) {
    const auto anchors = [&](CandidatesOfAnchors& candidates, const auto* p, const auto* q, bool of_columns,
                             const Tensor& values, const Tensor& indices) {
      for_each_anchor(candidates.anchors(), [&](int64_t anchor) {
        rescored += exact_best(candidates, anchor, p + anchor * depth, q, depth,
                               limit && !of_columns ? limit + anchor : nullptr, of_columns ? limit : nullptr, of.k,
                               values.mutable_data_ptr<float>() + anchor * of.k,
                               indices.mutable_data_ptr<int64_t>() + anchor * of.k);
      });
    };
    anchors(of_rows, x, y, false, out.values, out.indices);
    anchors(of_cols, y, x, true, out.col_values, out.col_indices);
  };
  if (a.scalar_type() == at::kFloat) rescore(a.const_data_ptr<float>(), b.const_data_ptr<float>());
  else rescore(a.const_data_ptr<at::Half>(), b.const_data_ptr<at::Half>());
  return {out, rescored};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> top_scores(const Tensor& a, const Tensor& b, int64_t k,
                                                              const std::optional<Tensor>& a_ids,
                                                              const std::optional<Tensor>& b_ids, bool exclude_self,
                                                              const std::optional<Tensor>& row_limit, bool columns,
                                                              std::string_view route) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type() &&
                        at::isFloatingType(a.scalar_type()),
                    "gssf::top_scores: expected a [N, D] and b [M, D] of one floating dtype, got ", a.sizes(), " and ",
                    b.sizes());
  const int64_t n = a.size(0), m = b.size(0);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(k > 0 && n <= kMost && m <= kMost, "gssf::top_scores: expected k >= 1 and fewer than 2^31 rows");
  TORCH_CHECK_VALUE(a_ids.has_value() == b_ids.has_value() && (!a_ids || (a_ids->numel() == n && b_ids->numel() == m)),
                    "gssf::top_scores: expected a_ids [N] and b_ids [M], or neither");
  const auto score = score_options(a);
  TORCH_CHECK_VALUE(
      !row_limit || (row_limit->dim() == 1 && row_limit->size(0) == n && row_limit->dtype() == score.dtype()),
      "gssf::top_scores: expected row_limit [N] of the scores' dtype");
  const bool narrow = a.scalar_type() == at::kFloat || a.scalar_type() == at::kHalf;
  TORCH_CHECK_VALUE(
      route.empty() || route == "sweep" || (route == "certified" && narrow && bf16_unit() != Bf16Unit::none),
      "route: expected \"\", \"sweep\" or, of float32 or float16 on a processor with a bf16 unit, "
      "\"certified\", got ",
      route);
  std::optional<Tensor> limit;
  if (row_limit) limit = row_limit->contiguous();
  const Search search{a, b, k, a_ids, b_ids, exclude_self, limit, columns};
  Tensor rescored = at::empty({0}, score.dtype(at::kLong));
  if (route == "certified") rescored = at::zeros({}, rescored.options());
  Results out;
  if (n == 0 || m == 0) {
    constexpr double none = -std::numeric_limits<double>::infinity();
    const auto index = score.dtype(at::kLong);
    out = {at::full({n, k}, none, score), at::full({n, k}, -1, index), at::full({columns ? m : 0, k}, none, score),
           at::full({columns ? m : 0, k}, -1, index)};
  } else if (route == "certified" || (route.empty() && certifies(a, b))) {
    const auto [results, count] = certified(search);
    out = results;
    if (route == "certified") rescored.fill_(count);
  } else {
    dispatch(a, [&](auto type) { out = sweep_for<decltype(type)>(search); });
  }
  return {out.values, out.indices, out.col_values, out.col_indices, rescored};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) { library.impl("top_scores", top_scores); }

}  // namespace gssf
