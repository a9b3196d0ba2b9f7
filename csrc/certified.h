// Certified mining: the hardest negatives of the exact scores, at the cost of a product on bf16 units.
//
// With x = x̂ + δx, x̂ the rounding of x to bf16, a score s and the unit's sum ŝ of the rounded products differ by
//
//     |s - ŝ| <= ‖δa‖ ‖b̂‖ + ‖a‖ ‖δb‖ + γ ‖â‖ ‖b̂‖ + τ,   since s - â·b̂ = δa·b̂ + a·δb (Cauchy and Schwarz).
//
// γ = D u / (1 - D u) bounds the rounding of a sum of D exact products in any order (Higham, Accuracy and Stability of
// Numerical Algorithms, 2nd ed., section 4.2), because Σ |â b̂| <= ‖â‖ ‖b̂‖; τ bounds the error of units that flush
// subnormals to zero. The norms are measured for the input's rows and rounded up, so this holds for every finite input.
//
// An anchor is a row or a column of s. A tile's ŝ bound each anchor's maximum from below, and a score that cannot reach
// the largest of these bounds is dropped. Of an anchor with a limit only scores that are below it for certain bound the
// maximum, and only those that may be below it remain. The remaining candidates, one or two scores per anchor, are
// computed again in fp64, in which products of fp32 numbers are exact. Where the bound drops too few (copies of one
// row, rows of very different length), a sweep in fp64 computes all scores.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "epilogues.h"

namespace gssf {

// A bound of |s - ŝ| for the scores of an anchor, a row of a (or of b), with a block of rows of the other input.
class ErrorBound {
 public:
  ErrorBound(const Rounded& anchors, const Rounded& others, const Blocks& blocks, int64_t depth) : anchors_(anchors) {
    for (int64_t block = 0; block < blocks.count; ++block) {
      Longest longest{};
      for (int64_t k = blocks.begin(block); k < blocks.begin(block) + blocks.length(block); ++k) {
        longest.norm = std::max(longest.norm, double(others.norm[k]) + others.residue[k]);
        longest.residue = std::max(longest.residue, double(others.residue[k]));
      }
      longest_.push_back(longest);
    }
    const double roundings = double(depth + 32) * 0x1p-24;  // of s, and those of this bound
    sum_ = roundings < 0.5 ? roundings / (1 - roundings) : INFINITY;
    flushed_ = double(depth) * 0x1p-124;
  }

  // The bound of |s - ŝ| for every score of an anchor with a block.
  double of(int64_t anchor, int64_t block) const {
    const auto [block_norm, block_residue] = longest_[block];
    const double norm = anchors_.norm[anchor], residue = anchors_.residue[anchor];
    return (residue * block_norm + norm * block_residue + sum_ * (norm + residue) * block_norm) * (1 + 0x1p-20) +
           flushed_;
  }

  // Whether every anchor's sums stay in fp32's range; false if an input is not finite.
  bool sums_are_finite() const {
    double max_norm = std::isfinite(sum_) ? 0 : INFINITY;
    for (const auto& block : longest_) max_norm = std::isfinite(block.norm) ? std::max(max_norm, block.norm) : INFINITY;
    for (size_t i = 0; i < anchors_.norm.size(); ++i)
      if (!((double(anchors_.norm[i]) + anchors_.residue[i]) * max_norm < 0x1p126)) return false;
    return true;
  }

 private:
  struct Longest {
    double norm, residue;  // maxima of ‖x̂‖ (bounded by ‖x‖ + ‖δx‖) and of ‖δx‖
  };
  const Rounded& anchors_;
  std::vector<Longest> longest_;
  double sum_, flushed_;
};

// The maximum of scores in fp64, and its index; -inf and -1 of none.
struct ExactMaximum {
  double score = -std::numeric_limits<double>::infinity();
  int64_t index = -1;
  void add(double other, int64_t at) {
    if (other > score || (other == score && at < index)) score = other, index = at;
  }
};

// An epilogue that keeps the candidates: scores that may be the hardest negative of their row or column.
class Candidates {
 public:
  struct Slot {};
  struct Candidate {
    int32_t i, j;
    float score;
  };

  // Ids are empty, or dense and padded to whole vectors. paired: the pairs (i, i) are positives. columns: columns are
  // anchors too. limits: the largest exact score that counts, for every row and every column.
  Candidates(const Bf16Panels& factors, const Blocks& rows, const Blocks& cols, const std::vector<int32_t>& row_id,
             const std::vector<int32_t>& col_id, bool paired = true, bool columns = true,
             const Limits<float>& limits = {})
      : paired_(paired),
        columns_(columns),
        limits_(limits),
        rows_(rows),
        cols_(cols),
        row_error_(factors.a(), factors.b(), cols, factors.depth()),
        col_error_(factors.b(), factors.a(), rows, factors.depth()),
        row_id_(row_id),
        col_id_(col_id),
        row_low_(rows.total),
        col_low_(cols.total),
        limit_(8 * (rows.total + cols.total) + (1 << 16)),
        given_up_(!row_error_.sums_are_finite() || !col_error_.sums_are_finite()) {
    for (auto* lows : {&row_low_, &col_low_})
      for (auto& low : *lows) low.store(kNone, std::memory_order_relaxed);
  }

  bool given_up() const { return given_up_; }

  void tile(float* s, const Tile& at, Slot&) {
    if (given_up_) return;
    const auto [i0, n, j0, m] = at;
    const int64_t width = ceil_div(m, Simd<float>::lanes) * Simd<float>::lanes;
    for (int64_t i = std::max(i0, j0); paired_ && i < std::min(i0 + n, j0 + m); ++i)
      s[(i - i0) * kTileMost + (i - j0)] = kNone;
    for (int64_t i = 0; i < n && width > m; ++i) std::fill(s + i * kTileMost + m, s + i * kTileMost + width, kNone);
    if (!col_id_.empty()) GSSF_VECTORIZED(mask_ids_of, s, n, m, row_id_.data() + i0, col_id_.data() + j0, kNone);

    const auto row_error = [&](int64_t i) { return row_error_.of(i0 + i, j0 / cols_.size); };
    const auto col_error = [&](int64_t j) { return col_error_.of(j0 + j, i0 / rows_.size); };
    PerAnchor<float> row, col, row_most, col_most;  // most: the largest ŝ that counts
    const bool limited = limits_.rows || limits_.cols;
    // sign -1: for certain; 1: perhaps.
    const auto bound_scores = [&](int sign) {
      for (int64_t i = 0; i < n; ++i) row_most[i] = most(limits_.rows, i0 + i, sign * row_error(i));
      for (int64_t j = 0; j < m; ++j) col_most[j] = most(limits_.cols, j0 + j, sign * col_error(j));
      std::fill(col_most.begin() + m, col_most.begin() + width, -kNone);
    };
    if (limited) bound_scores(-1);
    GSSF_VECTORIZED(tile_tops_of, s, n, m, limited ? row_most.data() : nullptr, col_most.data(), row.data(),
                    col.data());
    for (int64_t i = 0; i < n; ++i) row[i] = least(row_low_[i0 + i], row[i], row_error(i), limited);
    for (int64_t j = 0; j < m; ++j) col[j] = columns_ ? least(col_low_[j0 + j], col[j], col_error(j), limited) : -kNone;
    std::fill(col.begin() + m, col.begin() + width, -kNone);
    if (limited) bound_scores(1);

    const auto places = std::make_unique_for_overwrite<int32_t[]>(n * kTileMost);
    const int64_t count = [&] {
      return GSSF_VECTORIZED(reaching_of, s, n, m, row.data(), col.data(), limited ? row_most.data() : nullptr,
                             col_most.data(), places.get());
    }();
    const std::lock_guard guard(lock_);
    for (int64_t k = 0; k < count; ++k)
      candidates_.push_back({static_cast<int32_t>(i0 + places[k] / kTileMost),
                             static_cast<int32_t>(j0 + places[k] % kTileMost), s[places[k]]});
    if (candidates_.size() > limit_) {
      prune();
      given_up_ = given_up_ || candidates_.size() > limit_ / 2;
    }
  }
  static void fold_rows(const Tile&, const Slot&) {}
  static void fold_cols(const Tile&, const Slot&) {}

  // The candidates after the whole sweep, sorted by row, so that each row is read once.
  const std::vector<Candidate>& left() {
    prune();
    std::sort(candidates_.begin(), candidates_.end(),
              [](const Candidate& x, const Candidate& y) { return std::tie(x.i, x.j) < std::tie(y.i, y.j); });
    return candidates_;
  }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  // An anchor's limit, moved by the error and rounded that way; +inf without limits. Upwards from the next number,
  // because an exact score a little above the limit may be rounded to it.
  static float most(const float* limits, int64_t anchor, double error) {
    if (!limits) return -kNone;
    const float limit = error < 0 ? limits[anchor] : std::nextafter(limits[anchor], -kNone);
    return std::nextafter(static_cast<float>(limit + error), error < 0 ? kNone : -kNone);
  }

  // Raises an anchor's lower bound to that of a tile's largest ŝ, and returns the smallest ŝ that is a candidate.
  // limited: a tile without a score that counts for certain may have candidates too.
  static float least(std::atomic<float>& low, float top, double error, bool limited) {
    if (top == kNone && !limited) return -kNone;
    const float bound = std::nextafter(static_cast<float>(top - error), kNone);
    float before = low.load(std::memory_order_relaxed);
    while (before < bound && !low.compare_exchange_weak(before, bound, std::memory_order_relaxed)) {
    }
    const float bar = std::nextafter(static_cast<float>(std::max(before, bound) - error), kNone);
    return std::max(bar, std::numeric_limits<float>::lowest());  // -inf marks scores of no negative
  }

  void prune() {
    std::erase_if(candidates_, [&](const Candidate& c) {
      return c.score + row_error_.of(c.i, c.j / cols_.size) < row_low_[c.i] &&
             (!columns_ || c.score + col_error_.of(c.j, c.i / rows_.size) < col_low_[c.j]);
    });
  }

  bool paired_, columns_;
  Limits<float> limits_;
  const Blocks &rows_, &cols_;
  ErrorBound row_error_, col_error_;
  const std::vector<int32_t>&row_id_, &col_id_;
  std::vector<std::atomic<float>> row_low_, col_low_;
  std::mutex lock_;
  std::vector<Candidate> candidates_;
  size_t limit_;
  std::atomic<bool> given_up_;
};

}  // namespace gssf
