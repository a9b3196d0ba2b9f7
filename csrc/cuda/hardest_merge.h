// The two small kernels round the sweep: ranges of ids before it, and after it the merge of its partial results.
#pragma once

#include "hardest_epilogue.h"
#include "hardest_layout.h"

namespace gssf::hopper {

// The range of every `width` of the `count` ids; one warp a block. Blocks from `a_blocks` on are b's.
struct Ranges {
  const int64_t *a_ids, *b_ids;
  IdRange *a, *b;
  int N, M, a_width, b_width, a_blocks;
};

GSSF_KERNEL(kWarp) ranges_kernel(GSSF_GRID Ranges p) {
  const bool of_a = chip::block() < p.a_blocks;
  const int64_t* ids = of_a ? p.a_ids : p.b_ids;
  const int count = of_a ? p.N : p.M, width = of_a ? p.a_width : p.b_width;
  const int at = of_a ? chip::block() : chip::block() - p.a_blocks;

  IdRange range{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
  const int64_t begin = int64_t(at) * width;
  for (int64_t k = begin + chip::thread(); k < begin + width && k < count; k += kWarp) {
    range.low = ids[k] < range.low ? ids[k] : range.low;
    range.high = ids[k] > range.high ? ids[k] : range.high;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int64_t low = chip::shuffle_xor(range.low, lanes), high = chip::shuffle_xor(range.high, lanes);
    range.low = low < range.low ? low : range.low;
    range.high = high > range.high ? high : range.high;
  }
  if (chip::thread() == 0) (of_a ? p.a : p.b)[at] = range;
}

struct Merge {
  int N, M;
  int first, blocks, columns;  // as in Sweep
  int BN, BM;
  Partials rows, cols;
  float *row_score, *col_score;
  int64_t *row_index, *col_index;
  int row_grid;  // blocks of the grid that merge rows; those after merge columns
};

constexpr int kSections = 8;  // of a line's parts, folded by one warp each

// Finishes the slab's rows, and merges its columns into those of the slabs before. One block for 32 lines.
GSSF_KERNEL(kWarp* kSections) merge_kernel(GSSF_GRID Merge p) {
  struct Sections {
    Best best[kSections][kWarp];
  };
  Sections& shared = chip::shared_memory<Sections>();
  const bool of_rows = chip::block() < p.row_grid;
  const int lane = chip::thread() % kWarp, section = chip::thread() / kWarp;
  const int64_t line = int64_t(of_rows ? chip::block() : chip::block() - p.row_grid) * kWarp + lane;
  const int64_t lines = of_rows ? int64_t(p.blocks) * p.BN : p.M;
  const int parts = of_rows ? p.columns : p.blocks, width = of_rows ? p.BM : p.BN;
  const int start = of_rows ? 0 : p.first * p.BN;

  const int each = static_cast<int>(ceil_div(parts, kSections));
  const int begin = section * each, end = begin + each < parts ? begin + each : parts;
  Best best{kNone, -1};
  if (line < lines) best = fold(best, of_rows ? p.rows : p.cols, line, lines, begin, end, width, start);
  shared.best[section][lane] = best;
  chip::sync_block();
  if (section > 0 || line >= lines) return;

  best = {kNone, -1};
  if (!of_rows && p.first > 0) best = {p.col_score[line], static_cast<int>(p.col_index[line])};
#pragma unroll
  for (int k = 0; k < kSections; ++k) {
    const Best later = shared.best[k][lane];
    if (beats(later.score, best.score)) best = later;
  }
  const int64_t i = int64_t(p.first) * p.BN + line;
  if (!of_rows) {
    p.col_score[line] = best.score;
    p.col_index[line] = best.index;
  } else if (i < p.N) {
    p.row_score[i] = best.score;
    p.row_index[i] = best.index;
  }
}

}  // namespace gssf::hopper
