// Ranges of ids, and how partials of hardest negatives are merged. Plain arithmetic, compared with brute force by
// tests/native/test_hopper_layout.py.
#pragma once

#include "sweep_layout.h"

namespace gssf::hopper {

// Smallest and largest id of a block of rows or columns: disjoint ranges share no id.
struct alignas(16) IdRange {
  int64_t low, high;
};

GSSF_BOTH bool overlap(IdRange x, IdRange y) { return x.low <= y.high && y.low <= x.high; }

// One partial per anchor (a row or a column) and tile of that anchor, as [tile, anchor].
struct Partials {
  float* score;
  int16_t* place;  // within the tile; arbitrary where the score is -inf
};

struct Best {
  float score;
  int index;
};

// Whether x replaces y, whose index is lower: it is larger, or the first NaN. An equal score never does, so the lowest
// index stays.
GSSF_BOTH bool beats(float x, float y) { return x > y || (x != x && y == y); }

// `best` merged with the partials [begin, end) of an anchor; partial p covers positions from p * width + start on.
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
