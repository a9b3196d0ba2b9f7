// Epilogues of the sweep: hardest negatives and relative negatives.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#define GSSF_KERNELS "vector_epilogues.h"
#include "sweep.h"

namespace gssf {

// Whether candidate v replaces the maximum m: it is greater, or it is the first NaN, which nothing replaces. (The same
// for vectors is in vector_maxima.h, compiled once per instruction set.)
template <class A>
bool displaces(A v, A m) {
  return v > m || (v != v && m == m);
}

// Numbers behind the limits of all anchors, so that a whole vector may be read.
constexpr int64_t kLimitPadding = 64;

// Maximum of the negatives of every row, or of every column, over the tiles merged so far; -inf and -1 for none.
template <class A>
struct RunningMaxima {
  A* score;
  int64_t* index;

  // Merges anchors anchor .. anchor + count with a tile whose indices start at `offset`, higher than all merged before:
  // an equal score never replaces.
  void fold(int64_t anchor, int64_t count, const Maxima<A>& tile, int64_t offset) const {
    for (int64_t k = 0; k < count; ++k) {
      if (!displaces(tile.score[k], score[anchor + k])) continue;
      score[anchor + k] = tile.score[k];
      index[anchor + k] = offset + tile.index[k];
    }
  }
};

// Which scores are no negatives besides those of equal ids, and which results are wanted.
template <class A>
struct Negatives {
  bool paired = true;   // the pair (i, i) is a positive
  bool columns = true;  // columns are anchors too
  // Pairs (i, cols[e]), starts[i] <= e < starts[i + 1], in the order of their columns, are positives. Null: none.
  const int64_t *starts = nullptr, *cols = nullptr;
  Limits<A> limits;
  A* positive_score = nullptr;  // of the pairs (i, i), or of the listed pairs
};

// The hardest negative of every row and column, and the scores of the pairs.
template <class A>
class HardestNegatives {
  using Lane = typename Simd<A>::Lane;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  using Slot = TileMaxima<A>;

  // Ids are empty, or dense and padded to whole vectors.
  HardestNegatives(const std::vector<Lane>& row_id, const std::vector<Lane>& col_id, const Negatives<A>& negatives,
                   RunningMaxima<A> rows, RunningMaxima<A> cols)
      : row_id_(row_id), col_id_(col_id), negatives_(negatives), rows_(rows), cols_(cols) {}

  const RunningMaxima<A>& rows() const { return rows_; }
  const RunningMaxima<A>& cols() const { return cols_; }

  // Sets scores of s that are no negatives to -inf.
  void tile(A* s, const Tile& at, TileMaxima<A>& maxima) const {
    const auto [i0, n, j0, m] = at;
    // The diagonal crosses only tiles whose ranges of i and j overlap.
    for (int64_t i = std::max(i0, j0); negatives_.paired && i < std::min(i0 + n, j0 + m); ++i) {
      A& score = s[(i - i0) * kTileMost + (i - j0)];
      negatives_.positive_score[i] = score;
      score = kNone;
    }
    for (int64_t i = i0; negatives_.starts && i < i0 + n; ++i) {
      const int64_t *const cols = negatives_.cols, *const end = cols + negatives_.starts[i + 1];
      const int64_t* const first = std::lower_bound(cols + negatives_.starts[i], end, j0);
      A* const scores = s + (i - i0) * kTileMost;
      for (const int64_t* e = first; e < end && *e < j0 + m; ++e) negatives_.positive_score[e - cols] = scores[*e - j0];
      // Afterwards, because a pair may be listed twice.
      for (const int64_t* e = first; e < end && *e < j0 + m; ++e) scores[*e - j0] = kNone;
    }
    for (int64_t i = 0; i < n && m % Simd<A>::lanes; ++i)
      std::fill(s + i * kTileMost + m, s + i * kTileMost + ceil_div(m, Simd<A>::lanes) * Simd<A>::lanes, kNone);
    const bool has_ids = !col_id_.empty() && !seen_;
    GSSF_VECTORIZED(tile_maxima_of, s, n, m, has_ids ? row_id_.data() + i0 : nullptr,
                    has_ids ? col_id_.data() + j0 : nullptr, limits(at), negatives_.columns, maxima);
  }

  void fold_rows(const Tile& at, const TileMaxima<A>& maxima) const { rows_.fold(at.i0, at.n, maxima.rows, at.j0); }
  void fold_cols(const Tile& at, const TileMaxima<A>& maxima) const {
    if (columns()) cols_.fold(at.j0, at.m, maxima.cols, at.i0);
  }

  // The same under the limits number k of several, with the results number k, for tiles that this one has seen: their
  // scores that are no negatives are -inf already.
  HardestNegatives under_limits(int64_t k, int64_t rows, int64_t cols) const {
    HardestNegatives out = *this;
    out.seen_ = true;
    out.negatives_.paired = false, out.negatives_.starts = nullptr;
    Limits<A>& limits = out.negatives_.limits;
    if (limits.rows) limits.rows += k * (rows + kLimitPadding);
    if (limits.cols) limits.cols += k * (cols + kLimitPadding);
    out.rows_ = {rows_.score + k * rows, rows_.index + k * rows};
    out.cols_ = {cols_.score + k * cols, cols_.index + k * cols};
    return out;
  }

  bool columns() const { return negatives_.columns; }
  Limits<A> limits(const Tile& at) const {
    const auto [rows, cols] = negatives_.limits;
    return {rows ? rows + at.i0 : nullptr, cols ? cols + at.j0 : nullptr};
  }

 private:
  const std::vector<Lane>&row_id_, &col_id_;
  Negatives<A> negatives_;
  RunningMaxima<A> rows_, cols_;
  bool seen_ = false;
};

// The hardest negatives under each of `count` limits of every anchor, from one product.
template <class A>
class HardestByLimit {
 public:
  using Slot = std::vector<TileMaxima<A>>;

  HardestByLimit(const HardestNegatives<A>& first, int64_t count, int64_t rows, int64_t cols) : levels_{first} {
    for (int64_t k = 1; k < count; ++k) levels_.push_back(first.under_limits(k, rows, cols));
  }

  void tile(A* s, const Tile& at, Slot& slot) const {
    slot.resize(levels_.size());
    for (size_t k = 0; k < levels_.size(); ++k) levels_[k].tile(s, at, slot[k]);
  }
  void fold_rows(const Tile& at, const Slot& slot) const {
    for (size_t k = 0; k < levels_.size(); ++k) levels_[k].fold_rows(at, slot[k]);
  }
  void fold_cols(const Tile& at, const Slot& slot) const {
    for (size_t k = 0; k < levels_.size(); ++k) levels_[k].fold_cols(at, slot[k]);
  }

 private:
  std::vector<HardestNegatives<A>> levels_;
};

// Relative negatives of one anchor over the tiles merged so far: a sum over the scores that count, except the maximum
// m. With beta the sum of e^{β(s - m)}, else of m - s.
struct Term {
  double sum = 0;
  int64_t count = 0, ties = 0;  // ties: how many of them equal m, without beta
};

// The hardest negatives and, relative to their scores, the mean over the others that are not below a threshold.
//
// No sum ever contains the term of the maximum, so nothing is subtracted; when a greater maximum comes, sums are
// rescaled to it, by factors of at most 1, and the former maximum is added to them like any other score.
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
        // -inf marks scores of no negative, so it never counts; NaN always counts, and with a NaN threshold all others
        // do.
        least_(threshold > -std::numeric_limits<A>::infinity() ? threshold : std::numeric_limits<A>::lowest()),
        beta_(beta),
        tile_beta_(beta ? static_cast<A>(*beta) : A(0)),
        rows_(rows),
        cols_(cols) {}

  void tile(A* s, const Tile& at, Slot& slot) const {
    hardest_.tile(s, at, slot.maxima);
    GSSF_VECTORIZED(tile_terms_of, s, at.n, at.m, slot.maxima, least_, beta_ ? &tile_beta_ : nullptr,
                    hardest_.limits(at), hardest_.columns(), slot.terms);
  }

  void fold_rows(const Tile& at, const Slot& slot) {
    fold(rows_.data() + at.i0, hardest_.rows().score + at.i0, at.n, slot.maxima.rows, slot.terms.rows);
    hardest_.fold_rows(at, slot.maxima);
  }
  void fold_cols(const Tile& at, const Slot& slot) {
    if (!hardest_.columns()) return;
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

  void fold(Term* terms, const A* maximum, int64_t count, const Maxima<A>& maxima, const Terms<A>& tile) const {
    for (int64_t k = 0; k < count; ++k) {
      if (!counts(maxima.score[k])) continue;  // then none of the tile's does
      const Term term{tile.sum[k], tile.count[k], tile.ties[k]};
      terms[k] = displaces(maxima.score[k], maximum[k]) ? merged(term, maxima.score[k], terms[k], maximum[k])
                                                        : merged(terms[k], maximum[k], term, maxima.score[k]);
    }
  }

  // The sum of `winner`, whose maximum is m, and `loser`, whose maximum is at most m, relative to m.
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
