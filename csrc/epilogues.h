// Epilogues of the reducing sweep.
#pragma once

#include <limits>
#include <vector>

#define GSSF_KERNELS "vector_maxima.h"
#include "isa.h"
#include "sweep.h"

namespace gssf {

// Whether candidate v displaces m: it is greater, or it is the first NaN. NaN is sticky. (The vectors' twin
// stands in vector_maxima.h, compiled once per instruction set.)
template <class A>
bool displaces(A v, A m) {
  return v > m || (v != v && m == m);
}

// Scores of the pairs (i, i), and the hardest negative of every row and column.
template <class A>
class HardestNegatives {
  using Lane = typename Simd<A>::Lane;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  HardestNegatives(const Blocks& rows, const Blocks& cols, const std::vector<Lane>& row_id,
                   const std::vector<Lane>& col_id, A* pair_score, A* row_score, int64_t* row_index, A* col_score,
                   int64_t* col_index)
      : rows_(rows),
        cols_(cols),
        row_id_(row_id),
        col_id_(col_id),
        row_locks_(rows.count),
        col_locks_(cols.count),
        pair_score_(pair_score),
        row_score_(row_score),
        row_index_(row_index),
        col_score_(col_score),
        col_index_(col_index) {
    std::fill_n(row_score, rows.total, kNone);
    std::fill_n(row_index, rows.total, -1);
    std::fill_n(col_score, cols.total, kNone);
    std::fill_n(col_index, cols.total, -1);
  }

  void tile(A* s, int64_t i0, int64_t n, int64_t j0, int64_t m) {
    // The diagonal crosses only tiles whose ranges of i and j overlap.
    for (int64_t i = std::max(i0, j0); i < std::min(i0 + n, j0 + m); ++i) {
      A& score = s[(i - i0) * kTileMost + (i - j0)];
      pair_score_[i] = score;
      score = kNone;
    }
    for (int64_t i = 0; i < n && m % Simd<A>::lanes; ++i)
      std::fill(s + i * kTileMost + m, s + i * kTileMost + ceil_div(m, Simd<A>::lanes) * Simd<A>::lanes, kNone);

    thread_local TileMaxima<A> found;
    const bool has_ids = !col_id_.empty();
    GSSF_VECTORIZED(tile_maxima_of, s, n, m, has_ids ? row_id_.data() + i0 : nullptr,
                    has_ids ? col_id_.data() + j0 : nullptr, found);
    {
      auto lock = row_locks_(i0 / rows_.size);
      merge(found.row_score.data(), found.row_index.data(), n, j0, row_score_ + i0, row_index_ + i0);
    }
    auto lock = col_locks_(j0 / cols_.size);
    merge(found.col_score.data(), found.col_index.data(), m, i0, col_score_ + j0, col_index_ + j0);
  }

 private:
  // Tiles arrive in any order, so equal scores (and NaNs) are settled by the lower index.
  static void merge(const A* score, const Lane* place, int64_t count, int64_t offset, A* best, int64_t* index) {
    for (int64_t k = 0; k < count; ++k) {
      if (place[k] < 0) continue;
      const int64_t candidate = offset + place[k];
      const bool tie = score[k] == best[k] || (score[k] != score[k] && best[k] != best[k]);
      if (displaces<A>(score[k], best[k]) || (tie && candidate < index[k])) {
        best[k] = score[k];
        index[k] = candidate;
      }
    }
  }

  const Blocks &rows_, &cols_;
  const std::vector<Lane>&row_id_, &col_id_;  // empty, or dense ids padded to whole vectors
  Locks row_locks_, col_locks_;
  A *pair_score_, *row_score_;
  int64_t* row_index_;
  A* col_score_;
  int64_t* col_index_;
};

}  // namespace gssf
