// Hardest negatives by gssf::hopper_sweep: checks, empty results, and the launches.
#pragma once

#include "hardest_epilogue.h"
#include "hardest_merge.h"
#include "sweep_launch.h"

namespace gssf::hopper {

inline void check_hardest(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids,
                          const std::optional<Tensor>& b_ids) {
  constexpr const char* name = "gssf::hopper_sweep";
  check_sides(name, a, b);
  STD_TORCH_CHECK(b.size(0) >= a.size(0), name, ": expected a [N, D] and b [M, D] with M >= N");
  STD_TORCH_CHECK(a_ids.has_value() == b_ids.has_value(), name, ": expected a_ids and b_ids, or neither");
  if (a_ids)
    for (const auto& [ids, count] : {std::pair{&*a_ids, a.size(0)}, std::pair{&*b_ids, b.size(0)}}) {
      STD_TORCH_CHECK(on_one_device(a, *ids), name, ": expected all tensors on one device");
      STD_TORCH_CHECK(
          ids->dim() == 1 && ids->size(0) == count && ids->is_contiguous() && ids->scalar_type() == ScalarType::Long,
          name, ": expected a_ids [N] and b_ids [M], int64 and contiguous");
    }
}

// Partials, with the tensors that hold them.
struct HardestPartials {
  Tensor score, place;
  HardestPartials(const Tensor& like, int64_t count)
      : score(room(like, count, ScalarType::Float)), place(room(like, count, ScalarType::Short)) {}
  Partials pointers() const { return {data<float>(score), data<int16_t>(place)}; }
};

// (low, high) of every block of rows, then of columns, and the ids they are of.
template <class Tile>
Tensor find_ranges(chip::Device& device, const Tensor& a_ids, const Tensor& b_ids, Hardest& task) {
  const int64_t N = a_ids.size(0), M = b_ids.size(0), a_blocks = ceil_div(N, Tile::ROWS);
  const int64_t blocks = a_blocks + ceil_div(M, Tile::BM);
  const Tensor ranges = room(a_ids, 2 * blocks, ScalarType::Long);
  Ranges of{};
  of.a_ids = task.a_ids = static_cast<const int64_t*>(a_ids.const_data_ptr());
  of.b_ids = task.b_ids = static_cast<const int64_t*>(b_ids.const_data_ptr());
  of.a = reinterpret_cast<IdRange*>(data<int64_t>(ranges)), of.b = of.a + a_blocks;
  task.a_ranges = of.a, task.b_ranges = of.b;
  of.N = N, of.M = M, of.a_width = Tile::ROWS, of.b_width = Tile::BM, of.a_blocks = a_blocks;
  device.launch(ranges_kernel, blocks, kWarp, 0, of);
  return ranges;
}

// (pair_score [N], row_score [N], row_index [N], col_score [M], col_index [M]) as gssf::hardest_negatives returns them.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives(const Tensor& a, const Tensor& b,
                                                                            const std::optional<Tensor>& a_ids,
                                                                            const std::optional<Tensor>& b_ids,
                                                                            const Limits& limits) {
  check_hardest(a, b, a_ids, b_ids);
  const int64_t N = a.size(0), M = b.size(0);
  chip::Device device(a);
  const Tensor pair_score = room(a, N, ScalarType::Float);
  const Tensor row_score = room(a, N, ScalarType::Float), row_index = room(a, N, ScalarType::Long);
  const Tensor col_score = room(a, M, ScalarType::Float), col_index = room(a, M, ScalarType::Long);
  if (N == 0) {
    torch::stable::fill_(col_score, kNone);
    torch::stable::fill_(col_index, -1);
    return {pair_score, row_score, row_index, col_score, col_index};
  }
  with_kind(a, [&](auto number, auto tile) {
    using Tile = decltype(tile);
    const Plan<Tile> plan(a, b, limits);
    const HardestPartials rows(a, plan.rows), cols(a, plan.cols);
    Hardest task{};
    task.pair_score = data<float>(pair_score), task.rows = rows.pointers(), task.cols = cols.pointers();
    std::optional<Tensor> ranges;
    if (a_ids) ranges = find_ranges<Tile>(device, *a_ids, *b_ids, task);
    sweep<decltype(number)::value>(device, plan, a, b, task, [&](const Area& slab) {
      launch_merge(device, HardestMerge{Lines::of(tile, slab), task.rows, task.cols, data<float>(row_score),
                                        data<float>(col_score), data<int64_t>(row_index), data<int64_t>(col_index)});
    });
  });
  return {pair_score, row_score, row_index, col_score, col_index};
}

// The op itself.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives_hopper(const Tensor& a, const Tensor& b,
                                                                                   const std::optional<Tensor>& a_ids,
                                                                                   const std::optional<Tensor>& b_ids) {
  return hardest_negatives(a, b, a_ids, b_ids, Limits());
}

}  // namespace gssf::hopper
