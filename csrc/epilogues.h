// Epilogues of the reducing sweep.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#define GSSF_KERNELS "vector_epilogues.h"
#include "sweep.h"

namespace gssf {

// Whether candidate v displaces m: it is greater, or it is the first NaN. NaN is sticky. (The vectors' twin
// stands in vector_maxima.h, compiled once per instruction set.)
template <class A>
bool displaces(A v, A m) {
  return v > m || (v != v && m == m);
}

// Best negative of every row, or of every column, so far; -inf and -1 where there is none.
template <class A>
struct Best {
  A* score;
  int64_t* index;

  // Merges `count` lines from `line` on with a tile whose places start at `offset`, past all those merged before:
  // an equal score never replaces.
  void fold(int64_t line, int64_t count, const Maxima<A>& tile, int64_t offset) const {
    for (int64_t k = 0; k < count; ++k) {
      if (!displaces(tile.score[k], score[line + k])) continue;
      score[line + k] = tile.score[k];
      index[line + k] = offset + tile.index[k];
    }
  }
};

// Scores of the pairs (i, i), and the hardest negative of every row and column.
template <class A>
class HardestNegatives {
  using Lane = typename Simd<A>::Lane;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  using Slot = TileMaxima<A>;

  // Ids are empty, or dense and padded to whole vectors.
  HardestNegatives(const std::vector<Lane>& row_id, const std::vector<Lane>& col_id, A* pair_score, Best<A> rows,
                   Best<A> cols)
      : row_id_(row_id), col_id_(col_id), pair_score_(pair_score), rows_(rows), cols_(cols) {}

  const Best<A>& rows() const { return rows_; }
  const Best<A>& cols() const { return cols_; }

  // Leaves -inf in s at all that is no negative.
  void tile(A* s, const Tile& at, TileMaxima<A>& found) const {
    const auto [i0, n, j0, m] = at;
    // The diagonal crosses only tiles whose ranges of i and j overlap.
    for (int64_t i = std::max(i0, j0); i < std::min(i0 + n, j0 + m); ++i) {
      A& score = s[(i - i0) * kTileMost + (i - j0)];
      pair_score_[i] = score;
      score = kNone;
    }
    for (int64_t i = 0; i < n && m % Simd<A>::lanes; ++i)
      std::fill(s + i * kTileMost + m, s + i * kTileMost + ceil_div(m, Simd<A>::lanes) * Simd<A>::lanes, kNone);
    const bool has_ids = !col_id_.empty();
    GSSF_VECTORIZED(tile_maxima_of, s, n, m, has_ids ? row_id_.data() + i0 : nullptr,
                    has_ids ? col_id_.data() + j0 : nullptr, found);
  }

  void fold_rows(const Tile& at, const TileMaxima<A>& found) const { rows_.fold(at.i0, at.n, found.rows, at.j0); }
  void fold_cols(const Tile& at, const TileMaxima<A>& found) const { cols_.fold(at.j0, at.m, found.cols, at.i0); }

 private:
  const std::vector<Lane>&row_id_, &col_id_;
  A* pair_score_;
  Best<A> rows_, cols_;
};

// The terms of one line's relative negatives so far: a sum over the scores that count, but for the maximum m.
// With beta the sum of e^{β(s - m)}, else of m - s.
struct Term {
  double sum = 0;
  int64_t count = 0, ties = 0;  // ties: those of the count that equal m, where distances are summed
};

// The hardest negatives and, relative to their scores, the mean over the others that are not below a threshold.
//
// No sum ever holds the maximum's own term, so nothing is subtracted; where maxima change, sums are carried over to
// the greater one, by factors of at most 1, and the maximum left behind joins them as a score like the others.
template <class A>
class RelativeNegatives {
 public:
  struct Slot {
    TileMaxima<A> maxima;
    TileTerms<A> terms;
  };

  // Without beta: the mean of distances.
  RelativeNegatives(const HardestNegatives<A>& hardest, int64_t rows, int64_t cols, A threshold,
                    std::optional<double> beta)
      : hardest_(hardest),
        // -inf marks what is no negative, so it counts under no threshold; NaN counts under all, NaN lets all count.
        least_(threshold > -std::numeric_limits<A>::infinity() ? threshold : std::numeric_limits<A>::lowest()),
        beta_(beta),
        tile_beta_(beta ? static_cast<A>(*beta) : A(0)),
        rows_(rows),
        cols_(cols) {}

  void tile(A* s, const Tile& at, Slot& slot) const {
    hardest_.tile(s, at, slot.maxima);
    GSSF_VECTORIZED(tile_terms_of, s, at.n, at.m, slot.maxima, least_, beta_ ? &tile_beta_ : nullptr, slot.terms);
  }

  void fold_rows(const Tile& at, const Slot& slot) {
    fold(rows_.data() + at.i0, hardest_.rows().score + at.i0, at.n, slot.maxima.rows, slot.terms.rows);
    hardest_.fold_rows(at, slot.maxima);
  }
  void fold_cols(const Tile& at, const Slot& slot) {
    fold(cols_.data() + at.j0, hardest_.cols().score + at.j0, at.m, slot.maxima.cols, slot.terms.cols);
    hardest_.fold_cols(at, slot.maxima);
  }

  void finish(A* row_relative, A* col_relative) const {
    std::transform(rows_.begin(), rows_.end(), row_relative, mean);
    std::transform(cols_.begin(), cols_.end(), col_relative, mean);
  }

 private:
  static A mean(const Term& term) {
    return static_cast<A>(term.sum / static_cast<double>(std::max<int64_t>(term.count - term.ties, 1)));
  }

  bool counts(A score) const { return !(score < least_); }

  void fold(Term* terms, const A* best, int64_t count, const Maxima<A>& maxima, const Terms<A>& tile) const {
    for (int64_t k = 0; k < count; ++k) {
      if (!counts(maxima.score[k])) continue;  // then none of the tile's does
      const Term found{tile.sum[k], tile.count[k], tile.ties[k]};
      terms[k] = displaces(maxima.score[k], best[k]) ? merged(found, maxima.score[k], terms[k], best[k])
                                                     : merged(terms[k], best[k], found, maxima.score[k]);
    }
  }

  // `winner` of maximum m with `loser` of maximum at most that.
  Term merged(Term winner, double m, const Term& loser, A loser_m) const {
    if (!counts(loser_m)) return winner;
    winner.count += loser.count + 1;
    if (beta_) {
      winner.sum += (loser.sum + 1) * std::exp(*beta_ * (loser_m - m));
    } else if (loser_m == m) {
      winner.sum += loser.sum;
      winner.ties += loser.ties + 1;
    } else {
      winner.sum += loser.sum + static_cast<double>(loser.count + 1) * (m - loser_m);
    }
    return winner;
  }

  HardestNegatives<A> hardest_;
  A least_;
  std::optional<double> beta_;
  A tile_beta_;
  std::vector<Term> rows_, cols_;
};

}  // namespace gssf
