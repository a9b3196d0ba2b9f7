// Epilogues of the reducing sweep.
#pragma once

#include <limits>
#include <vector>

#include "simd.h"
#include "sweep.h"

namespace gssf {

// Whether candidate v displaces m: it is greater, or it is the first NaN. NaN is sticky.
template <class T>
GSSF_INLINE auto displaces(const T& v, const T& m) {
  return (v > m) | ((v != v) & (m == m));
}

// Maxima of one tile over its rows and its columns, with their places inside the tile.
template <class A>
struct TileMaxima {
  std::vector<A> row_score, col_score;
  std::vector<typename Simd<A>::Lane> row_index, col_index;
  TileMaxima() : row_score(kTile.n), col_score(kTile.m), row_index(kTile.n), col_index(kTile.m) {}
};

// Row and column maxima of s [n, m], places of equal row_id and col_id left out where ids are given.
// The padding behind each row, up to a whole vector, must hold -inf. Ties keep the lowest index.
template <class A>
GSSF_INLINE void tile_maxima(
    const A* s, int64_t n, int64_t m, const typename Simd<A>::Lane* row_id, const typename Simd<A>::Lane* col_id,
    TileMaxima<A>& out) {
  using V = typename Simd<A>::Vector;
  using I = typename Simd<A>::Index;
  using Lane = typename Simd<A>::Lane;
  constexpr int64_t L = Simd<A>::lanes;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const V none = V{} + kNone;
  I lane;
  for (int64_t k = 0; k < L; ++k) lane[k] = static_cast<Lane>(k);

  const int64_t width = ceil_div(m, L) * L;
  std::fill_n(out.col_score.data(), width, kNone);
  std::fill_n(out.col_index.data(), width, Lane(-1));
  for (int64_t i = 0; i < n; ++i) {
    V best = none;
    I place = I{} - 1;
    for (int64_t j = 0; j < width; j += L) {
      V v = load<V>(s + i * kTile.m + j);
      if (col_id) v = load<I>(col_id + j) == I{} + row_id[i] ? none : v;
      const V col = load<V>(out.col_score.data() + j);
      const I col_place = load<I>(out.col_index.data() + j);
      const I wins_col = displaces(v, col);
      store(out.col_score.data() + j, wins_col ? v : col);
      store(out.col_index.data() + j, wins_col ? I{} + static_cast<Lane>(i) : col_place);
      const I wins_row = displaces(v, best);
      best = wins_row ? v : best;
      place = wins_row ? lane + static_cast<Lane>(j) : place;
    }
    A score = best[0];
    Lane index = place[0];
    for (int64_t k = 1; k < L; ++k) {
      const bool tie = (best[k] == score || (best[k] != best[k] && score != score)) && place[k] < index;
      if (displaces<A>(best[k], score) || (tie && place[k] >= 0)) score = best[k], index = place[k];
    }
    out.row_score[i] = score;
    out.row_index[i] = index;
  }
}

GSSF_CLONES inline void tile_maxima_of(
    const float* s, int64_t n, int64_t m, const int32_t* row_id, const int32_t* col_id, TileMaxima<float>& out) {
  tile_maxima<float>(s, n, m, row_id, col_id, out);
}

GSSF_CLONES inline void tile_maxima_of(
    const double* s, int64_t n, int64_t m, const int64_t* row_id, const int64_t* col_id, TileMaxima<double>& out) {
  tile_maxima<double>(s, n, m, row_id, col_id, out);
}

// Scores of the pairs (i, i), and the hardest negative of every row and column.
template <class A>
class HardestNegatives {
  using Lane = typename Simd<A>::Lane;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  HardestNegatives(
      const Blocks& rows, const Blocks& cols, const std::vector<Lane>& row_id, const std::vector<Lane>& col_id,
      A* pair_score, A* row_score, int64_t* row_index, A* col_score, int64_t* col_index)
      : rows_(rows), cols_(cols), row_id_(row_id), col_id_(col_id), row_locks_(rows.count), col_locks_(cols.count),
        pair_score_(pair_score), row_score_(row_score), row_index_(row_index), col_score_(col_score),
        col_index_(col_index) {
    std::fill_n(row_score, rows.total, kNone);
    std::fill_n(row_index, rows.total, -1);
    std::fill_n(col_score, cols.total, kNone);
    std::fill_n(col_index, cols.total, -1);
  }

  void tile(A* s, int64_t i0, int64_t n, int64_t j0, int64_t m) {
    // The diagonal crosses only tiles whose ranges of i and j overlap.
    for (int64_t i = std::max(i0, j0); i < std::min(i0 + n, j0 + m); ++i) {
      A& score = s[(i - i0) * kTile.m + (i - j0)];
      pair_score_[i] = score;
      score = kNone;
    }
    for (int64_t i = 0; i < n && m % Simd<A>::lanes; ++i)
      std::fill(s + i * kTile.m + m, s + i * kTile.m + ceil_div(m, Simd<A>::lanes) * Simd<A>::lanes, kNone);

    thread_local TileMaxima<A> found;
    const bool has_ids = !col_id_.empty();
    tile_maxima_of(s, n, m, has_ids ? row_id_.data() + i0 : nullptr, has_ids ? col_id_.data() + j0 : nullptr, found);
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
