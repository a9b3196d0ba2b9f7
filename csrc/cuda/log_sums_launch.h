// Log-sums by gssf::hopper_sweep: checks, empty results, and the launches.
#pragma once

#include "log_sums_epilogue.h"
#include "log_sums_merge.h"
#include "sweep_launch.h"

namespace gssf::hopper {

inline void check_log_sums(const Tensor& a, const Tensor& b, const std::optional<Tensor>& scale) {
  constexpr const char* name = "gssf::hopper_sweep";
  check_sides(name, a, b);
  if (!scale) return;
  STD_TORCH_CHECK(on_one_device(a, *scale), name, ": expected all tensors on one device");
  STD_TORCH_CHECK(scale->numel() == 1 && scale->scalar_type() == ScalarType::Float, name,
                  ": expected scale to be one fp32 number");
}

// (row_max [N], row_log [N], col_max [M], col_log [M], pair [min(N, M)]) as gssf::logsumexp_scores returns them.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logsumexp_scores(const Tensor& a, const Tensor& b,
                                                                           const std::optional<Tensor>& scale,
                                                                           double constant, const Limits& limits) {
  check_log_sums(a, b, scale);
  const int64_t N = a.size(0), M = b.size(0);
  chip::Device device(a);
  const Tensor row_max = room(a, N, ScalarType::Float), row_log = room(a, N, ScalarType::Float);
  const Tensor col_max = room(a, M, ScalarType::Float), col_log = room(a, M, ScalarType::Float);
  const Tensor pair = room(a, std::min(N, M), ScalarType::Float);
  if (N == 0 || M == 0) {
    for (const Tensor& x : {row_max, row_log, col_max, col_log}) torch::stable::fill_(x, kNone);
    return {row_max, row_log, col_max, col_log, pair};
  }
  with_kind(a, [&](auto number, auto tile) {
    using Tile = decltype(tile);
    const Plan<Tile> plan(a, b, limits);
    const Tensor held = room(a, 2 * (plan.rows + plan.cols), ScalarType::Float);
    float* const first = data<float>(held);
    LogSums task{};
    task.scale = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
    task.constant = static_cast<float>(constant);
    task.pair = data<float>(pair);
    task.rows = {first, first + plan.rows};
    task.cols = {first + 2 * plan.rows, first + 2 * plan.rows + plan.cols};
    sweep<decltype(number)::value>(device, plan, a, b, task, [&](const Area& slab) {
      launch_merge(device,
                   LogMerge{Lines::of(tile, slab), task.rows, task.cols, data<float>(row_max), data<float>(row_log),
                            data<float>(col_max), data<float>(col_log), slab.first + slab.blocks == plan.row_blocks});
    });
  });
  return {row_max, row_log, col_max, col_log, pair};
}

// The op itself.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logsumexp_scores_hopper(const Tensor& a, const Tensor& b,
                                                                                  const std::optional<Tensor>& scale,
                                                                                  double constant) {
  return logsumexp_scores(a, b, scale, constant, Limits());
}

}  // namespace gssf::hopper
