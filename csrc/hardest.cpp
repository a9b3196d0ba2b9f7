// gssf::hardest_negatives on the CPU: the reducing sweep with the HardestNegatives epilogue.
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

template <class A>
void run(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids,
         Tensor& pair_score, Tensor& row_score, Tensor& row_index, Tensor& col_score, Tensor& col_index) {
  std::pair<std::vector<typename Simd<A>::Lane>, std::vector<typename Simd<A>::Lane>> ids;
  if (a_ids) ids = dense_ids<typename Simd<A>::Lane>(a_ids->contiguous(), b_ids->contiguous());
  const Blocks rows(a.size(0), kTileMost), cols(b.size(0), tile_cols(b.size(0)));
  HardestNegatives<A> epilogue(rows, cols, ids.first, ids.second, pair_score.mutable_data_ptr<A>(),
                               row_score.mutable_data_ptr<A>(), row_index.mutable_data_ptr<int64_t>(),
                               col_score.mutable_data_ptr<A>(), col_index.mutable_data_ptr<int64_t>());
  sweep<A>(a, b, rows, cols, epilogue);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives(const Tensor& a, const Tensor& b,
                                                                     const std::optional<Tensor>& a_ids,
                                                                     const std::optional<Tensor>& b_ids) {
  const int64_t n = a.size(0), m = b.size(0);
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && m >= n &&
                        a.scalar_type() == b.scalar_type() && at::isFloatingType(a.scalar_type()),
                    "gssf::hardest_negatives: expected a [N, D] and b [M, D] of one floating dtype with M >= N, got ",
                    a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(a_ids.has_value() == b_ids.has_value() && (!a_ids || (a_ids->numel() == n && b_ids->numel() == m)),
                    "gssf::hardest_negatives: expected a_ids [N] and b_ids [M], or neither");
  const auto dtype = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto score = a.options().dtype(dtype), index = a.options().dtype(at::kLong);
  Tensor pair_score = at::empty({n}, score), row_score = at::empty({n}, score), row_index = at::empty({n}, index);
  Tensor col_score = at::full({m}, -std::numeric_limits<double>::infinity(), score),
         col_index = at::full({m}, -1, index);
  if (n > 0 && dtype == at::kDouble) {
    run<double>(a, b, a_ids, b_ids, pair_score, row_score, row_index, col_score, col_index);
  } else if (n > 0) {
    // fp16 and bf16 convert to fp32 exactly, so scores are those of an fp32 product.
    run<float>(a.to(dtype), b.to(dtype), a_ids, b_ids, pair_score, row_score, row_index, col_score, col_index);
  }
  return {pair_score, row_score, row_index, col_score, col_index};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) { library.impl("hardest_negatives", hardest_negatives); }

}  // namespace gssf
