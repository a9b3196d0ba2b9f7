// The sweep: every score of s = a bᵀ passes through a thread's cache once, tile by tile, and an epilogue reduces each
// tile to partials, which are merged into row and column statistics, O(N + M). No score is stored.
//
// An epilogue is a class with
//   Slot                                            the partials of one tile, O(n + m), uninitialised at first
//   void tile(Scalar* s, const Tile&, Slot&)        fills it; called from several threads at once, in any order
//   void fold_rows(const Tile&, const Slot&)        merges the tile's row partials into the row statistics,
//   void fold_cols(const Tile&, const Slot&)        and its column partials into the column statistics
// The epilogue may overwrite s [n, m], whose rows are kTileMost apart, and the kTileMost - m places behind each row.
// The tiles of one block of rows are merged in the order of their columns, those of one block of columns in the order
// of their rows, so that even sums have the same bits at every thread count. A slab is the range of row blocks whose
// partials are held at once; slabs are swept one after another, which bounds memory and keeps that order.
//
// Stages are named for PyTorch's profiler ("gssf::stage::…"), which shows those of the calling thread.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "factors.h"

namespace gssf {

// Slots of a slab per thread, unless one block of rows has more tiles than all threads have slots: so many that threads
// rarely wait for the last tile of a slab, and about as much memory as the thread's tile (a slot has 8 KiB and up, a
// tile 1 MiB).
constexpr int64_t kSlotsPerThread = 64;

// At least one row and one column. With `upper_triangle`, for a symmetric s, tiles below the diagonal are not computed.
template <class Factors, class Epilogue>
void sweep(const Factors& factors, const Blocks& rows, const Blocks& cols, Epilogue& epilogue,
           bool upper_triangle = false, int64_t slots_per_thread = kSlotsPerThread) {
  using Scalar = typename Factors::Scalar;
  const int64_t threads = at::get_num_threads();
  const int64_t slab = std::clamp<int64_t>(slots_per_thread * threads / cols.count, 1, rows.count);  // row blocks
  const auto slots = std::make_unique_for_overwrite<typename Epilogue::Slot[]>(slab * cols.count);
  std::vector<at::Tensor> buffers(threads);
  for (int64_t first = 0; first < rows.count; first += slab) {
    const int64_t blocks = std::min(slab, rows.count - first), tiles = blocks * cols.count;
    const auto at_place = [&](int64_t t) {
      const int64_t i = first + t / cols.count, j = t % cols.count;
      return Tile{rows.begin(i), rows.length(i), cols.begin(j), cols.length(j)};
    };
    const auto below_diagonal = [&](const Tile& tile) { return upper_triangle && tile.j0 + tile.m <= tile.i0; };
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads, tiles), 1, [&](int64_t worker, int64_t) {
      at::Tensor& buffer = buffers[worker];
      if (!buffer.defined())
        buffer = at::empty({rows.size, kTileMost}, at::TensorOptions(c10::CppTypeToScalarType<Scalar>::value));
      Scalar* s = buffer.mutable_data_ptr<Scalar>();
      for (int64_t t; (t = next.fetch_add(1)) < tiles;) {
        const Tile tile = at_place(t);
        if (below_diagonal(tile)) continue;
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
    const int64_t folds = blocks + cols.count;                // one per row block, then one per column block
    const bool few = tiles * (rows.size + cols.size) < 4096;  // less work than starting threads
    at::parallel_for(0, folds, few ? folds : 1, [&](int64_t begin, int64_t end) {
      for (int64_t fold = begin; fold < end; ++fold) {
        if (fold < blocks) {
          for (int64_t t = fold * cols.count; t < (fold + 1) * cols.count; ++t)
            if (const Tile tile = at_place(t); !below_diagonal(tile)) epilogue.fold_rows(tile, slots[t]);
        } else {
          for (int64_t t = fold - blocks; t < tiles; t += cols.count)
            if (const Tile tile = at_place(t); !below_diagonal(tile)) epilogue.fold_cols(tile, slots[t]);
        }
      }
    });
  }
}

}  // namespace gssf
