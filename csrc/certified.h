// Certified mining: the hardest negatives of the exact scores, at the price of a product on bf16 units.
//
// With x = x̂ + δx, x̂ the rounding of x to bf16, a score and the sum ŝ that the unit makes of the rounded sides differ
// by
//
//     |s - ŝ| <= ‖δa‖ ‖b̂‖ + ‖a‖ ‖δb‖ + γ ‖â‖ ‖b̂‖ + τ,   since s - â·b̂ = δa·b̂ + a·δb (Cauchy and Schwarz).
//
// γ = D u / (1 - D u) bounds the rounding of a sum of D exact products in any order (Higham, Accuracy and Stability of
// Numerical Algorithms, 2nd ed., section 4.2), because Σ |â b̂| <= ‖â‖ ‖b̂‖; τ what units lose that take subnormals for
// zero. All norms are those measured of the rows at hand, rounded up, so this holds for every finite input.
//
// A tile's ŝ thus bound each line's best from below, and whatever cannot reach the best bound so far is passed over.
// What is left, one or two scores a line, is made again in fp64, in which products of fp32 numbers are exact. Where the
// bound does not tell scores apart (copies of one row, rows of very different length), a sweep in fp64 takes over.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "epilogues.h"

namespace gssf {

// What bounds the errors of the scores of one side's rows with a block of the other's.
class ErrorBound {
 public:
  ErrorBound(const Rounded& lines, const Rounded& others, const Blocks& blocks, int64_t depth) : lines_(lines) {
    for (int64_t block = 0; block < blocks.count; ++block) {
      Longest found{};
      for (int64_t k = blocks.begin(block); k < blocks.begin(block) + blocks.length(block); ++k) {
        found.norm = std::max(found.norm, double(others.norm[k]) + others.residue[k]);
        found.residue = std::max(found.residue, double(others.residue[k]));
      }
      longest_.push_back(found);
    }
    const double roundings = double(depth + 32) * 0x1p-24;  // with the few of the bound itself
    sum_ = roundings < 0.5 ? roundings / (1 - roundings) : INFINITY;
    flushed_ = double(depth) * 0x1p-124;
  }

  // Of every score of a line with a block: what |s - ŝ| does not exceed.
  double of(int64_t line, int64_t block) const {
    const auto [norm, residue] = longest_[block];
    const double mine = lines_.norm[line], lost = lines_.residue[line];
    return (lost * norm + mine * residue + sum_ * (mine + lost) * norm) * (1 + 0x1p-20) + flushed_;
  }

  // Whether no sum of any line can leave fp32's range; false too where an input is not finite.
  bool sums_are_finite() const {
    double most = std::isfinite(sum_) ? 0 : INFINITY;
    for (const auto& block : longest_) most = std::isfinite(block.norm) ? std::max(most, block.norm) : INFINITY;
    for (size_t i = 0; i < lines_.norm.size(); ++i)
      if (!((double(lines_.norm[i]) + lines_.residue[i]) * most < 0x1p126)) return false;
    return true;
  }

 private:
  struct Longest {
    double norm, residue;  // of rounded rows, and of what they lost
  };
  const Rounded& lines_;
  std::vector<Longest> longest_;
  double sum_, flushed_;
};

// Scores in fp64 and where they are; -inf and -1 where there is none.
struct ExactBest {
  double score = -std::numeric_limits<double>::infinity();
  int64_t index = -1;
  void add(double other, int64_t at) {
    if (other > score || (other == score && at < index)) score = other, index = at;
  }
};

// An epilogue that keeps what may be the best negative of a row or a column.
class Candidates {
 public:
  struct Slot {};
  struct Candidate {
    int32_t i, j;
    float score;
  };

  // Ids are empty, or dense and padded to whole vectors.
  Candidates(const Bf16Panels& factors, const Blocks& rows, const Blocks& cols, const std::vector<int32_t>& row_id,
             const std::vector<int32_t>& col_id)
      : rows_(rows),
        cols_(cols),
        row_error_(factors.a(), factors.b(), cols, factors.depth()),
        col_error_(factors.b(), factors.a(), rows, factors.depth()),
        row_id_(row_id),
        col_id_(col_id),
        row_low_(rows.total),
        col_low_(cols.total),
        most_(8 * (rows.total + cols.total) + (1 << 16)),
        given_up_(!row_error_.sums_are_finite() || !col_error_.sums_are_finite()) {
    for (auto* lows : {&row_low_, &col_low_})
      for (auto& low : *lows) low.store(kNone, std::memory_order_relaxed);
  }

  bool given_up() const { return given_up_; }

  void tile(float* s, const Tile& at, Slot&) {
    if (given_up_) return;
    const auto [i0, n, j0, m] = at;
    const int64_t width = ceil_div(m, Simd<float>::lanes) * Simd<float>::lanes;
    for (int64_t i = std::max(i0, j0); i < std::min(i0 + n, j0 + m); ++i) s[(i - i0) * kTileMost + (i - j0)] = kNone;
    for (int64_t i = 0; i < n && width > m; ++i) std::fill(s + i * kTileMost + m, s + i * kTileMost + width, kNone);
    if (!col_id_.empty()) GSSF_VECTORIZED(mask_ids_of, s, n, m, row_id_.data() + i0, col_id_.data() + j0);

    PerLine<float> row, col;
    GSSF_VECTORIZED(tile_tops_of, s, n, m, row.data(), col.data());
    for (int64_t i = 0; i < n; ++i) row[i] = least(row_low_[i0 + i], row[i], row_error_.of(i0 + i, j0 / cols_.size));
    for (int64_t j = 0; j < m; ++j) col[j] = least(col_low_[j0 + j], col[j], col_error_.of(j0 + j, i0 / rows_.size));
    std::fill(col.begin() + m, col.begin() + width, -kNone);

    const auto places = std::make_unique_for_overwrite<int32_t[]>(n * kTileMost);
    const int64_t count = [&] { return GSSF_VECTORIZED(reaching_of, s, n, m, row.data(), col.data(), places.get()); }();
    const std::lock_guard guard(lock_);
    for (int64_t k = 0; k < count; ++k)
      found_.push_back({static_cast<int32_t>(i0 + places[k] / kTileMost),
                        static_cast<int32_t>(j0 + places[k] % kTileMost), s[places[k]]});
    if (found_.size() > most_) {
      prune();
      given_up_ = given_up_ || found_.size() > most_ / 2;
    }
  }
  static void fold_rows(const Tile&, const Slot&) {}
  static void fold_cols(const Tile&, const Slot&) {}

  // Those that may be a best one, now that all scores were seen; by rows, which are then read once.
  const std::vector<Candidate>& left() {
    prune();
    std::sort(found_.begin(), found_.end(),
              [](const Candidate& x, const Candidate& y) { return std::tie(x.i, x.j) < std::tie(y.i, y.j); });
    return found_;
  }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  // Raises a line's bound by the largest ŝ of a tile, and returns the least ŝ of the tile that may be the line's best.
  static float least(std::atomic<float>& low, float top, double error) {
    if (top == kNone) return -kNone;
    const float sure = std::nextafter(static_cast<float>(top - error), kNone);
    float before = low.load(std::memory_order_relaxed);
    while (before < sure && !low.compare_exchange_weak(before, sure, std::memory_order_relaxed)) {
    }
    const float bar = std::nextafter(static_cast<float>(std::max(before, sure) - error), kNone);
    return std::max(bar, std::numeric_limits<float>::lowest());  // what is no negative scores -inf
  }

  void prune() {
    std::erase_if(found_, [&](const Candidate& c) {
      return c.score + row_error_.of(c.i, c.j / cols_.size) < row_low_[c.i] &&
             c.score + col_error_.of(c.j, c.i / rows_.size) < col_low_[c.j];
    });
  }

  const Blocks &rows_, &cols_;
  ErrorBound row_error_, col_error_;
  const std::vector<int32_t>&row_id_, &col_id_;
  std::vector<std::atomic<float>> row_low_, col_low_;
  std::mutex lock_;
  std::vector<Candidate> found_;
  size_t most_;
  std::atomic<bool> given_up_;
};

}  // namespace gssf
