// Ids by ranges, and the rule by which partial results of the search for hardest negatives merge. Plain arithmetic,
// held to brute force by tests/native/test_hopper_layout.py.
#pragma once

#include "sweep_layout.h"

namespace gssf::hopper {

// Least and largest id of a block of rows or columns: disjoint ranges share no id.
struct alignas(16) IdRange {
  int64_t low, high;
};

GSSF_BOTH bool overlap(IdRange x, IdRange y) { return x.low <= y.high && y.low <= x.high; }

// One partial result for each line (a row or a column) and each part (a tile on that line), as [part, line].
struct Partials {
  float* score;
  int16_t* place;  // within the tile; arbitrary where the score is -inf
};

struct Best {
  float score;
  int index;
};

// x takes the place of y, which was found before it: larger, or the first NaN. An equal score never does, so
// the lowest index stays.
GSSF_BOTH bool beats(float x, float y) { return x > y || (x != x && y == y); }

// best merged with parts [begin, end) of a line; part p covers positions from p * width + start on.
GSSF_BOTH Best fold(Best best, const Partials& partials, int64_t line, int64_t lines, int begin, int end, int width,
                    int start) {
  for (int p = begin; p < end; ++p) {
    const int64_t at = p * lines + line;
    const float score = partials.score[at];
    if (beats(score, best.score)) best = {score, start + p * width + partials.place[at]};
  }
  return best;
}

}  // namespace gssf::hopper
