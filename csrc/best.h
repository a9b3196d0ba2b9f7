// Epilogues of the sweep for search: the k best scores of every row, and of every column, exactly or as candidates of
// the exact best.
//
// Unlike other epilogues they merge a tile into the statistics at once, under locks, because what was kept so far is
// what spares them the tile's other scores. The k best do not depend on the order of the tiles: scores are ordered by
// value, NaN first, and then by index.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "certified.h"

namespace gssf {

// b is packed in chunks of rows of at most this size, or of a tile's columns: they stay in a shared cache, and memory
// does not grow with b.
constexpr int64_t kChunkBytes = 16 << 20;

// Calls f(first, rows of b from there on) for each chunk, whose numbers have `bytes` bytes when they are packed.
template <class F>
void for_each_chunk(const at::Tensor& b, int64_t bytes, const F& f) {
  const int64_t tiles = kChunkBytes / (std::max<int64_t>(b.size(1), 1) * bytes * kTileMost);
  const int64_t step = std::max<int64_t>(tiles, 1) * kTileMost;
  for (int64_t first = 0; first < b.size(0); first += step)
    f(first, b.slice(0, first, std::min(first + step, b.size(0))));
}

// A tile of a chunk whose columns begin at `first`, among all columns.
inline Tile moved(const Tile& at, int64_t first) { return {at.i0, at.n, at.j0 + first, at.m}; }

// A score with the index of its candidate.
template <class A>
struct Scored {
  A score;
  int32_t index;
};

// Whether x comes before y.
template <class A>
bool before(const Scored<A>& x, const Scored<A>& y) {
  return displaces(x.score, y.score) || (!displaces(y.score, x.score) && x.index < y.index);
}

// Locks of anchors, one for every kAnchors: threads that work on one block of anchors follow one another through it.
class AnchorLocks {
 public:
  static constexpr int64_t kAnchors = 16;
  explicit AnchorLocks(int64_t anchors) : locks_(ceil_div(anchors, kAnchors)) {}
  std::mutex& of(int64_t anchor) { return locks_[anchor / kAnchors]; }

 private:
  std::vector<std::mutex> locks_;
};

// The k best of each anchor so far: a heap for each, whose first is the last of the k.
template <class A>
class BestOfAnchors {
 public:
  BestOfAnchors(int64_t anchors, int64_t k)
      : k_(k), kept_(anchors), size_(anchors, 0), least_(anchors), locks_(anchors) {
    for (auto& least : least_) least.store(std::numeric_limits<A>::lowest(), std::memory_order_relaxed);
  }

  int64_t anchors() const { return static_cast<int64_t>(size_.size()); }

  // No score below this enters. Read without the lock: it only rises.
  A least(int64_t anchor) const { return least_[anchor].load(std::memory_order_relaxed); }

  std::mutex& lock(int64_t anchor) { return locks_.of(anchor); }

  // Under the anchor's lock.
  void offer(int64_t anchor, Scored<A> candidate) {
    if (candidate.score == -std::numeric_limits<A>::infinity()) return;
    auto& heap = kept_[anchor];
    int32_t& size = size_[anchor];
    if (!heap) heap = std::make_unique_for_overwrite<Scored<A>[]>(k_);
    if (size == k_) {
      if (!before(candidate, heap[0])) return;
      std::pop_heap(heap.get(), heap.get() + size--, before<A>);
    }
    heap[size++] = candidate;
    std::push_heap(heap.get(), heap.get() + size, before<A>);
    if (size == k_) {
      const A last = heap[0].score;
      least_[anchor].store(last == last ? last : std::numeric_limits<A>::infinity(), std::memory_order_relaxed);
    }
  }

  // The best of an anchor, in order, then -inf and -1.
  void write(int64_t anchor, A* values, int64_t* indices) {
    Scored<A>* heap = kept_[anchor].get();
    const int64_t size = size_[anchor];
    if (heap) std::sort_heap(heap, heap + size, before<A>);
    for (int64_t c = 0; c < k_; ++c) {
      values[c] = c < size ? heap[c].score : -std::numeric_limits<A>::infinity();
      indices[c] = c < size ? heap[c].index : -1;
    }
    kept_[anchor].reset();
  }

 private:
  int64_t k_;
  std::vector<std::unique_ptr<Scored<A>[]>> kept_;
  std::vector<int32_t> size_;
  std::vector<std::atomic<A>> least_;
  AnchorLocks locks_;
};

// Which scores are left out of a search.
template <class A>
struct LeftOut {
  using Lane = typename Simd<A>::Lane;
  const std::vector<Lane>&row_id, &col_id;  // empty, or dense and padded: scores of equal ids
  bool self;                                // scores (i, i)

  // Sets them, and what is behind each row up to a whole vector, to `value`.
  void mask(A* s, const Tile& at, A value) const {
    const auto [i0, n, j0, m] = at;
    for (int64_t i = std::max(i0, j0); self && i < std::min(i0 + n, j0 + m); ++i)
      s[(i - i0) * kTileMost + (i - j0)] = value;
    const int64_t width = ceil_div(m, Simd<A>::lanes) * Simd<A>::lanes;
    for (int64_t i = 0; i < n && width > m; ++i) std::fill(s + i * kTileMost + m, s + i * kTileMost + width, value);
    if (!col_id.empty()) GSSF_VECTORIZED(mask_ids_of, s, n, m, row_id.data() + i0, col_id.data() + j0, value);
  }
};

// Calls f(i, j) for the places of a tile that reach the least of their row or, unless col is null, of their column, row
// by row and under the lock of the row.
template <class A, class Anchors, class F>
void for_each_reaching(const A* s, const Tile& at, const A* row, const A* col, Anchors& anchors, const F& f) {
  constexpr int64_t kRows = AnchorLocks::kAnchors;
  std::array<int32_t, kRows * kTileMost> places;
  for (int64_t i0 = 0; i0 < at.n; i0 += kRows) {
    const int64_t rows = std::min(kRows, at.n - i0), count = [&] {
      return GSSF_VECTORIZED(reaching_of, s + i0 * kTileMost, rows, at.m, row + i0, col, nullptr, nullptr,
                             places.data());
    }();
    if (count == 0) continue;
    const std::lock_guard guard(anchors.lock(at.i0 + i0));  // a tile's rows begin at a multiple of kRows
    for (int64_t p = 0; p < count; ++p)
      if (const int64_t j = places[p] % kTileMost; j < at.m) f(i0 + places[p] / kTileMost, j);
  }
}

// The k best scores of every row and, with `columns`, of every column.
template <class A>
class BestScores {
 public:
  struct Slot {};

  // limit: the largest score of each row that counts, or null.
  BestScores(const LeftOut<A>& left_out, const A* limit, BestOfAnchors<A>& rows, BestOfAnchors<A>* cols)
      : left_out_(left_out), limit_(limit), rows_(rows), cols_(cols) {}

  // The columns of the tiles to come begin at `first`.
  void begin(int64_t first) { first_ = first; }

  void tile(A* s, const Tile& of_chunk, Slot&) {
    const Tile at = moved(of_chunk, first_);
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    left_out_.mask(s, at, kNone);
    if (limit_) GSSF_VECTORIZED(limit_rows_of, s, at.n, ceil_div(at.m, 16) * 16, limit_ + at.i0);
    PerAnchor<A> row, col;
    col.fill(-kNone);
    for (int64_t i = 0; i < at.n; ++i) row[i] = rows_.least(at.i0 + i);
    for (int64_t j = 0; cols_ && j < at.m; ++j) col[j] = cols_->least(at.j0 + j);
    for_each_reaching(s, at, row.data(), cols_ ? col.data() : nullptr, rows_, [&](int64_t i, int64_t j) {
      const A score = s[i * kTileMost + j];
      if (!(score < row[i])) rows_.offer(at.i0 + i, {score, static_cast<int32_t>(at.j0 + j)});
      if (cols_ && !(score < col[j])) {
        const std::lock_guard guard(cols_->lock(at.j0 + j));
        cols_->offer(at.j0 + j, {score, static_cast<int32_t>(at.i0 + i)});
      }
    });
  }
  static void fold_rows(const Tile&, const Slot&) {}
  static void fold_cols(const Tile&, const Slot&) {}

 private:
  LeftOut<A> left_out_;
  const A* limit_;
  BestOfAnchors<A>& rows_;
  BestOfAnchors<A>* cols_;
  int64_t first_ = 0;
};

// Candidates of the k best exact scores of each anchor: the k largest lower bounds so far, and every score whose upper
// bound reaches the least of these.
class CandidatesOfAnchors {
 public:
  CandidatesOfAnchors(int64_t anchors, int64_t k)
      : k_(k), bounds_(anchors, k), candidates_(anchors), limit_(4 * k + 64) {}

  int64_t anchors() const { return bounds_.anchors(); }
  float least(int64_t anchor) const { return bounds_.least(anchor); }
  std::mutex& lock(int64_t anchor) { return bounds_.lock(anchor); }

  // Under the anchor's lock. counts: whether the exact score counts for certain. False: there are too many.
  bool offer(int64_t anchor, float score, double error, int32_t index, bool counts) {
    const float low = std::nextafter(static_cast<float>(score - error), -INFINITY);
    const float high = std::nextafter(static_cast<float>(score + error), INFINITY);
    if (high < least(anchor)) return true;
    if (counts) bounds_.offer(anchor, {low, index});
    auto& kept = candidates_[anchor];
    kept.push_back({high, index});
    if (kept.size() <= limit_) return true;
    prune(anchor);
    return kept.size() <= limit_ / 2;
  }

  // What is left of an anchor's candidates.
  const std::vector<Scored<float>>& left(int64_t anchor) {
    prune(anchor);
    return candidates_[anchor];
  }
  void drop(int64_t anchor) { candidates_[anchor] = {}; }

 private:
  void prune(int64_t anchor) {
    std::erase_if(candidates_[anchor], [&](const Scored<float>& c) { return c.score < least(anchor); });
  }

  int64_t k_;
  BestOfAnchors<float> bounds_;
  std::vector<std::vector<Scored<float>>> candidates_;
  size_t limit_;
};

// The candidates of rows and, with `columns`, of columns, from products of bf16; ErrorBound has the bound. For one
// chunk, whose columns begin at `first`.
class BestCandidates {
 public:
  struct Slot {};

  BestCandidates(const Bf16Panels& factors, const Blocks& rows, const Blocks& cols, const LeftOut<float>& left_out,
                 const float* limit, CandidatesOfAnchors& of_rows, CandidatesOfAnchors* of_cols, int64_t first = 0)
      : left_out_(left_out),
        limit_(limit),
        of_rows_(of_rows),
        of_cols_(of_cols),
        rows_(rows),
        cols_(cols),
        row_error_(factors.a(), factors.b(), cols, factors.depth()),
        col_error_(factors.b(), factors.a(), rows, factors.depth()),
        first_(first),
        given_up_(!row_error_.sums_are_finite() || !col_error_.sums_are_finite()) {}

  bool given_up() const { return given_up_; }

  void tile(float* s, const Tile& of_chunk, Slot&) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    if (given_up_) return;
    const Tile at = moved(of_chunk, first_);
    left_out_.mask(s, at, kNone);
    PerAnchor<double> row_error, col_error;
    PerAnchor<float> row, col, most;
    col.fill(-kNone);
    for (int64_t i = 0; i < at.n; ++i) {
      row_error[i] = row_error_.of(at.i0 + i, of_chunk.j0 / cols_.size);
      row[i] = reach(of_rows_.least(at.i0 + i), row_error[i]);
      // An exact score a little above the limit may be rounded to it.
      if (limit_) most[i] = up(static_cast<float>(up(limit_[at.i0 + i]) + row_error[i]));
    }
    if (limit_) GSSF_VECTORIZED(limit_rows_of, s, at.n, ceil_div(at.m, 16) * 16, most.data());
    for (int64_t j = 0; of_cols_ && j < at.m; ++j) {
      col_error[j] = col_error_.of(of_chunk.j0 + j, at.i0 / rows_.size);
      col[j] = reach(of_cols_->least(at.j0 + j), col_error[j]);
    }
    bool few = true;
    for_each_reaching(s, at, row.data(), of_cols_ ? col.data() : nullptr, of_rows_, [&](int64_t i, int64_t j) {
      const float score = s[i * kTileMost + j];
      if (score == kNone) return;
      const bool counts = !limit_ || up(static_cast<float>(score + row_error[i])) <= limit_[at.i0 + i];
      if (score >= row[i])
        few &= of_rows_.offer(at.i0 + i, score, row_error[i], static_cast<int32_t>(at.j0 + j), counts);
      if (of_cols_ && score >= col[j]) {
        const std::lock_guard guard(of_cols_->lock(at.j0 + j));
        few &= of_cols_->offer(at.j0 + j, score, col_error[j], static_cast<int32_t>(at.i0 + i), counts);
      }
    });
    if (!few) given_up_ = true;
  }
  static void fold_rows(const Tile&, const Slot&) {}
  static void fold_cols(const Tile&, const Slot&) {}

 private:
  static float up(float x) { return std::nextafter(x, INFINITY); }
  // The smallest ŝ whose upper bound may reach `least`.
  static float reach(float least, double error) {
    const float bar = std::nextafter(static_cast<float>(least - error), -INFINITY);
    return std::max(std::nextafter(bar, -INFINITY), std::numeric_limits<float>::lowest());
  }

  LeftOut<float> left_out_;
  const float* limit_;
  CandidatesOfAnchors &of_rows_, *of_cols_;
  const Blocks &rows_, &cols_;
  ErrorBound row_error_, col_error_;
  int64_t first_;
  std::atomic<bool> given_up_;
};

}  // namespace gssf
