// What ops with a sweep share: checks of a and b, empty results, tensor maps, and the sweep's launches. Slabs of row
// blocks bound the memory of partials, as in gssf_kernels/triton/sweep.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "sweep.h"
#include "sweep_merge.h"

namespace gssf::hopper {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSharedSlack = 1024;  // to start on 1024 bytes

struct Limits {
  int64_t entries = int64_t(1) << 24;  // partials of a slab, 6 or 8 bytes each, unless
  int64_t blocks = 16;                 // a slab of this many row blocks has a larger number
};

inline bool on_one_device(const Tensor& x, const Tensor& y) {
  return x.is_cuda() == y.is_cuda() && x.get_device_index() == y.get_device_index();
}

// Checks a [N, D] and b [M, D]; name: of the op, for its errors.
inline void check_sides(const char* name, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(1) > 0, name,
                  ": expected a [N, D] and b [M, D] with D >= 1");
  constexpr int64_t most = (int64_t(1) << 31) - 1024;  // so that no place in a tile overflows 32 bits
  STD_TORCH_CHECK(std::max({a.size(0), b.size(0), a.size(1)}) <= most, name,
                  ": expected N, M and D of at most 2^31 - 1024");
  STD_TORCH_CHECK((a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half) &&
                      a.scalar_type() == b.scalar_type(),
                  name, ": expected a and b both bfloat16 or both float16");
  for (const Tensor* x : {&a, &b})
    STD_TORCH_CHECK(x->stride(1) == 1 && x->stride(0) >= x->size(1) && x->stride(0) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
                    name, ": expected adjacent channels, and rows that start on 16 bytes");
  STD_TORCH_CHECK(on_one_device(a, b), name, ": expected all tensors on one device");
}

inline Tensor room(const Tensor& like, int64_t count, ScalarType type) {
  return torch::stable::new_empty(like, {count}, type);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// f(number, tile) for the kind of number and the shape of tile that a's rows ask for.
template <class F>
void with_kind(const Tensor& a, F f) {
  const auto with_tile = [&](auto number) {
    if (a.size(1) >= kCooperativeDepth) f(number, Cooperative());
    else f(number, Pingpong());
  };
  if (a.scalar_type() == ScalarType::BFloat16) with_tile(std::integral_constant<Number, Number::bf16>());
  else with_tile(std::integral_constant<Number, Number::fp16>());
}

// The whole area and its slabs. A slab has `rows` row and `cols` column partials.
template <class Tile>
struct Plan {
  Area area{};
  int64_t row_blocks, slab, rows, cols;

  Plan(const Tensor& a, const Tensor& b, const Limits& limits) : row_blocks(ceil_div(a.size(0), Tile::BN)) {
    area.N = a.size(0), area.M = b.size(0), area.D = a.size(1), area.columns = ceil_div(area.M, Tile::BM);
    const int64_t entries = area.M + int64_t(Tile::BN) * area.columns;  // of one row block
    slab = std::min(row_blocks, std::max(limits.blocks, limits.entries / entries));
    rows = slab * Tile::BN * area.columns, cols = slab * area.M;
  }
};

// The sweep by slabs, and after(task) once a slab's sweep is launched. task: its pointers.
template <Number NUMBER, class Tile, class Task, class F>
void sweep(chip::Device& device, const Plan<Tile>& plan, const Tensor& a, const Tensor& b, Task task, F after) {
  constexpr int bytes = sizeof(Shared<Tile, Task>) + kSharedSlack;
  static_assert(bytes <= 227 * 1024, "what a block may have");
  static_cast<Area&>(task) = plan.area;
  const auto a_map = chip::tensor_map(NUMBER, a.const_data_ptr(), task.N, task.D, a.stride(0) * 2, Tile::BN);
  const auto b_map = chip::tensor_map(NUMBER, b.const_data_ptr(), task.M, task.D, b.stride(0) * 2, Tile::BM);
  for (int64_t first = 0; first < plan.row_blocks; first += plan.slab) {
    task.first = first, task.blocks = std::min(plan.slab, plan.row_blocks - first);
    const int64_t tiles = int64_t(task.blocks) * task.columns;
    device.launch(sweep_kernel<NUMBER, Tile, Task>, std::min<int64_t>(device.processors, tiles), Tile::THREADS, bytes,
                  a_map, b_map, task);
    after(task);
  }
}

// The merge of a slab's partials.
template <class Merge>
void launch_merge(chip::Device& device, const Merge& merge) {
  device.launch(merge_kernel<Merge>, merge.grid, kWarp * kSections,
                sizeof(Sections<typename Merge::Result>) + kSharedSlack, merge);
}

}  // namespace gssf::hopper
