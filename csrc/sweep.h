// The reducing sweep: every score of s = a bᵀ passes through a thread's cache once, tile by tile, and
// an epilogue folds each tile into statistics of O(N + M).
//
// An epilogue is a class with
//   Slot                                            what one tile leaves behind, O(n + m), uninitialised at first
//   void tile(Scalar* s, const Tile&, Slot&)        fills it; from several threads at once, in any order
//   void fold_rows(const Tile&, const Slot&)        adds its rows' part to the rows' statistics,
//   void fold_cols(const Tile&, const Slot&)        and its columns' to the columns'
// where s [n, m], rows kTileMost apart, is the epilogue's to overwrite; the kTileMost - m places behind each
// row belong to it too. The tiles of one block of rows are folded in the order of their columns, those of one
// block of columns in the order of their rows, so that even sums have the same bits whatever the thread count.
// Row blocks go through in rounds, which bounds the slots and, the order being the same, changes no bit either.
//
// Stages are named for PyTorch's profiler ("gssf::stage::…"), which sees those of the calling thread.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "factors.h"

namespace gssf {

// One dimension cut into blocks of nearly equal size, multiples of kBlockStep but for the last.
struct Blocks {
  int64_t total, size, count;
  Blocks(int64_t total, int64_t most) : total(total) {
    size = ceil_div(ceil_div(total, ceil_div(total, most)), kBlockStep) * kBlockStep;
    count = ceil_div(total, size);
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, total - block * size); }
};

// Slots held at once per thread, unless one block of rows has more tiles than all threads' together: so many that
// waiting for the last tile of a round is rare, and about as much memory as the thread's own tile (a slot has 8 KiB
// and up, a tile 1 MiB).
constexpr int64_t kSlotsPerThread = 64;

// At least one row and one column. With `half`, tiles below the diagonal are left out: for a symmetric s.
template <class Factors, class Epilogue>
void sweep(const Factors& factors, const Blocks& rows, const Blocks& cols, Epilogue& epilogue, bool half = false) {
  using Scalar = typename Factors::Scalar;
  const int64_t threads = at::get_num_threads();
  const int64_t round = std::clamp<int64_t>(kSlotsPerThread * threads / cols.count, 1, rows.count);  // row blocks
  const auto slots = std::make_unique_for_overwrite<typename Epilogue::Slot[]>(round * cols.count);
  std::vector<at::Tensor> buffers(threads);
  for (int64_t first = 0; first < rows.count; first += round) {
    const int64_t blocks = std::min(round, rows.count - first), tiles = blocks * cols.count;
    const auto at_place = [&](int64_t t) {
      const int64_t i = first + t / cols.count, j = t % cols.count;
      return Tile{rows.begin(i), rows.length(i), cols.begin(j), cols.length(j)};
    };
    const auto left_out = [&](const Tile& tile) { return half && tile.j0 + tile.m <= tile.i0; };
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads, tiles), 1, [&](int64_t worker, int64_t) {
      at::Tensor& buffer = buffers[worker];
      if (!buffer.defined())
        buffer = at::empty({rows.size, kTileMost}, at::TensorOptions(c10::CppTypeToScalarType<Scalar>::value));
      Scalar* s = buffer.mutable_data_ptr<Scalar>();
      for (int64_t t; (t = next.fetch_add(1)) < tiles;) {
        const Tile tile = at_place(t);
        if (left_out(tile)) continue;
        {
          RECORD_FUNCTION("gssf::stage::product", {});
          factors.tile(tile, s);
        }
        RECORD_FUNCTION("gssf::stage::epilogue", {});
        epilogue.tile(s, tile, slots[t]);
      }
      Factors::leave_thread();
    });
    RECORD_FUNCTION("gssf::stage::fold", {});
    const int64_t lines = blocks + cols.count;
    const bool few = tiles * (rows.size + cols.size) < 4096;  // less work than threads take to start
    at::parallel_for(0, lines, few ? lines : 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        if (line < blocks) {
          for (int64_t t = line * cols.count; t < (line + 1) * cols.count; ++t)
            if (const Tile tile = at_place(t); !left_out(tile)) epilogue.fold_rows(tile, slots[t]);
        } else {
          for (int64_t t = line - blocks; t < tiles; t += cols.count)
            if (const Tile tile = at_place(t); !left_out(tile)) epilogue.fold_cols(tile, slots[t]);
        }
      }
    });
  }
}

}  // namespace gssf
