// Before the sweep for hardest negatives, ranges of ids; after it, the merge of its partials.
#pragma once

#include "hardest_layout.h"
#include "sweep_merge.h"

namespace gssf::hopper {

// The range of every `width` of the `count` ids; one warp per block. Blocks from `a_blocks` on are b's.
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

struct HardestMerge : Lines {
  using Result = Best;

  Partials rows, cols;
  float *row_score, *col_score;
  int64_t *row_index, *col_index;

  GSSF_DEVICE Best nothing() const { return {kNone, -1}; }

  GSSF_DEVICE Best fold(bool of_rows, int64_t line, int64_t lines, int begin, int end) const {
    if (of_rows) return hopper::fold(nothing(), rows, line, lines, begin, end, BM, 0);
    return hopper::fold(nothing(), cols, line, lines, begin, end, BN, area.first * BN);
  }

  GSSF_DEVICE Best join(Best earlier, Best later) const { return beats(later.score, earlier.score) ? later : earlier; }

  GSSF_DEVICE Best before(int64_t j) const { return {col_score[j], static_cast<int>(col_index[j])}; }

  GSSF_DEVICE void write_row(int64_t i, Best best) const { row_score[i] = best.score, row_index[i] = best.index; }
  GSSF_DEVICE void write_column(int64_t j, Best best) const { col_score[j] = best.score, col_index[j] = best.index; }
};

}  // namespace gssf::hopper
