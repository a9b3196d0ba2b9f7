// gssf::hardest_negatives_hopper: checks, room for the results, and the launches. Slabs of row blocks bound the memory
// of partial results, as in gssf_kernels/kernels/sweep.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "hardest_merge.h"
#include "hardest_sweep.h"

namespace gssf::hopper {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSharedSlack = 1024;  // to start on 1024 bytes

struct Limits {
  int64_t entries = int64_t(1) << 24;  // partial results held at once, 6 bytes each, unless
  int64_t blocks = 16;                 // so many row blocks in a slab ask for more
};

inline void check(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids,
                  const std::optional<Tensor>& b_ids) {
  constexpr const char* name = "gssf::hardest_negatives_hopper: ";
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(1) > 0 && b.size(0) >= a.size(0),
                  name, "expected a [N, D] and b [M, D] with M >= N and D >= 1");
  constexpr int64_t most = (int64_t(1) << 31) - 1024;  // so that no place in a tile overflows 32 bits
  STD_TORCH_CHECK(b.size(0) <= most && a.size(1) <= most, name, "expected M and D of at most 2^31 - 1024");
  STD_TORCH_CHECK((a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half) &&
                      a.scalar_type() == b.scalar_type(),
                  name, "expected a and b both bfloat16 or both float16");
  for (const Tensor* x : {&a, &b})
    STD_TORCH_CHECK(x->stride(1) == 1 && x->stride(0) >= x->size(1) && x->stride(0) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
                    name, "expected adjacent channels, and rows that start on 16 bytes");
  const auto together = [&](const Tensor& x) {
    return x.is_cuda() == a.is_cuda() && x.get_device_index() == a.get_device_index();
  };
  STD_TORCH_CHECK(together(b) && (!a_ids || together(*a_ids)) && (!b_ids || together(*b_ids)), name,
                  "expected all tensors on one device");
  STD_TORCH_CHECK(a_ids.has_value() == b_ids.has_value(), name, "expected a_ids and b_ids, or neither");
  if (a_ids)
    for (const auto& [ids, count] : {std::pair{&*a_ids, a.size(0)}, std::pair{&*b_ids, b.size(0)}})
      STD_TORCH_CHECK(
          ids->dim() == 1 && ids->size(0) == count && ids->is_contiguous() && ids->scalar_type() == ScalarType::Long,
          name, "expected a_ids [N] and b_ids [M], int64 and contiguous");
}

inline Tensor room(const Tensor& like, int64_t count, ScalarType type) {
  return torch::stable::new_empty(like, {count}, type);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Partial results, with the tensors that hold them.
struct PartialResults {
  Tensor score, place;
  PartialResults(const Tensor& like, int64_t count)
      : score(room(like, count, ScalarType::Float)), place(room(like, count, ScalarType::Short)) {}
  Partials pointers() const { return {data<float>(score), data<int16_t>(place)}; }
};

struct Results {
  Tensor pair_score, row_score, row_index, col_score, col_index;
};

template <Number NUMBER, class Tile>
void run(chip::Device& device, const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids,
         const std::optional<Tensor>& b_ids, const Limits& limits, const Results& out) {
  static_assert(sizeof(Shared<Tile>) + kSharedSlack <= 227 * 1024, "what a block may have");
  const int64_t N = a.size(0), M = b.size(0), D = a.size(1);
  const int64_t row_blocks = ceil_div(N, Tile::BN), columns = ceil_div(M, Tile::BM);
  const int64_t entries = M + Tile::BN * columns;  // of one row block
  const int64_t slab = std::min(row_blocks, std::max(limits.blocks, limits.entries / entries));
  const PartialResults rows(a, slab * Tile::BN * columns), cols(a, slab * M);

  Sweep p{};
  p.N = N, p.M = M, p.D = D, p.columns = columns;
  p.pair_score = data<float>(out.pair_score);
  p.rows = rows.pointers(), p.cols = cols.pointers();
  std::optional<Tensor> ranges;  // (low, high) of every block of rows, then of columns
  if (a_ids) {
    const int64_t a_blocks = ceil_div(N, Tile::ROWS);
    ranges = room(a, 2 * (a_blocks + columns), ScalarType::Long);
    IdRange* first = reinterpret_cast<IdRange*>(data<int64_t>(*ranges));
    p.a_ids = static_cast<const int64_t*>(a_ids->const_data_ptr());
    p.b_ids = static_cast<const int64_t*>(b_ids->const_data_ptr());
    p.a_ranges = first, p.b_ranges = first + a_blocks;
    Ranges of{};
    of.a_ids = p.a_ids, of.a = first, of.N = N, of.a_width = Tile::ROWS, of.a_blocks = a_blocks;
    of.b_ids = p.b_ids, of.b = first + a_blocks, of.M = M, of.b_width = Tile::BM;
    device.launch(ranges_kernel, a_blocks + columns, kWarp, 0, of);
  }

  const auto a_map = chip::tensor_map(NUMBER, a.const_data_ptr(), N, D, a.stride(0) * 2, Tile::BN);
  const auto b_map = chip::tensor_map(NUMBER, b.const_data_ptr(), M, D, b.stride(0) * 2, Tile::BM);
  for (int64_t first = 0; first < row_blocks; first += slab) {
    const int64_t blocks = std::min(slab, row_blocks - first);
    p.first = first, p.blocks = blocks;
    device.launch(sweep_kernel<NUMBER, Tile>, std::min<int64_t>(device.processors, blocks * columns), Tile::THREADS,
                  sizeof(Shared<Tile>) + kSharedSlack, a_map, b_map, p);

    const int64_t row_grid = ceil_div(blocks * Tile::BN, kWarp);
    Merge merge{};
    merge.N = N, merge.M = M;
    merge.first = first, merge.blocks = blocks, merge.columns = columns;
    merge.BN = Tile::BN, merge.BM = Tile::BM;
    merge.rows = p.rows, merge.cols = p.cols;
    merge.row_score = data<float>(out.row_score), merge.row_index = data<int64_t>(out.row_index);
    merge.col_score = data<float>(out.col_score), merge.col_index = data<int64_t>(out.col_index);
    merge.row_grid = row_grid;
    device.launch(merge_kernel, row_grid + ceil_div(M, kWarp), kWarp * kSections,
                  kSections * kWarp * sizeof(Best) + kSharedSlack, merge);
  }
}

// (pair_score [N], row_score [N], row_index [N], col_score [M], col_index [M]) as gssf::hardest_negatives gives them.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives(const Tensor& a, const Tensor& b,
                                                                            const std::optional<Tensor>& a_ids,
                                                                            const std::optional<Tensor>& b_ids,
                                                                            const Limits& limits) {
  check(a, b, a_ids, b_ids);
  const int64_t N = a.size(0), M = b.size(0);
  chip::Device device(a);
  const Results out{room(a, N, ScalarType::Float), room(a, N, ScalarType::Float), room(a, N, ScalarType::Long),
                    room(a, M, ScalarType::Float), room(a, M, ScalarType::Long)};
  if (N == 0) {
    torch::stable::fill_(out.col_score, kNone);
    torch::stable::fill_(out.col_index, -1);
  } else {
    const auto with = [&](auto number, auto tile) {
      run<decltype(number)::value, decltype(tile)>(device, a, b, a_ids, b_ids, limits, out);
    };
    const auto with_tile = [&](auto number) {
      if (a.size(1) >= kCooperativeDepth) with(number, Cooperative());
      else with(number, Pingpong());
    };
    if (a.scalar_type() == ScalarType::BFloat16) with_tile(std::integral_constant<Number, Number::bf16>());
    else with_tile(std::integral_constant<Number, Number::fp16>());
  }
  return {out.pair_score, out.row_score, out.row_index, out.col_score, out.col_index};
}

// The op itself.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_negatives_hopper(const Tensor& a, const Tensor& b,
                                                                                   const std::optional<Tensor>& a_ids,
                                                                                   const std::optional<Tensor>& b_ids) {
  return hardest_negatives(a, b, a_ids, b_ids, Limits());
}

}  // namespace gssf::hopper
