// gssf::score_counts on the CPU: how many scores of every row and column of s = a bᵀ reach levels.
#include <torch/library.h>

#include <array>
#include <numeric>
#include <optional>
#include <tuple>

#include "best.h"
#include "ids.h"

namespace gssf {
namespace {

using at::Tensor;

// The levels of anchors, and what is counted for each.
template <class A>
class Counted {
 public:
  // starts: [anchors + 1], or null for one level each.
  Counted(const Tensor& levels, const std::optional<Tensor>& starts, int64_t anchors, const Tensor& greater,
          const Tensor& reaching)
      : levels_(levels.const_data_ptr<A>()),
        starts_(anchors + 1),
        greater_(greater.mutable_data_ptr<int64_t>()),
        reaching_(reaching.mutable_data_ptr<int64_t>()),
        locks_(anchors) {
    if (starts) std::copy_n(starts->const_data_ptr<int64_t>(), anchors + 1, starts_.begin());
    else std::iota(starts_.begin(), starts_.end(), int64_t(0));
    for (int64_t i = 0; i < anchors; ++i) most_ = std::max(most_, starts_[i + 1] - starts_[i]);
  }

  const A* levels() const { return levels_; }
  const int64_t* starts() const { return starts_.data(); }
  int64_t most() const { return most_; }  // the most levels of an anchor

  // Adds what a tile counted for the levels first .. last, of anchors from `anchor` on.
  void add(int64_t anchor, int64_t first, int64_t last, const int64_t* greater, const int64_t* reaching) {
    const std::lock_guard guard(locks_.of(anchor));
    for (int64_t l = first; l < last; ++l) greater_[l] += greater[l - first], reaching_[l] += reaching[l - first];
  }

 private:
  const A* levels_;
  std::vector<int64_t> starts_;
  int64_t *greater_, *reaching_;
  AnchorLocks locks_;
  int64_t most_ = 0;
};

// Pairs (i, cols[e]), starts[i] <= e < starts[i + 1], by column.
struct Listed {
  const int64_t *starts = nullptr, *cols = nullptr;
};

// An epilogue that counts. What is left out becomes NaN, which reaches nothing.
template <class A>
class CountScores {
 public:
  struct Slot {};

  CountScores(const LeftOut<A>& left_out, const Listed& listed, Counted<A>& rows, Counted<A>* cols)
      : left_out_(left_out), listed_(listed), rows_(rows), cols_(cols) {}

  // The columns of the tiles to come begin at `first`.
  void begin(int64_t first) { first_ = first; }

  void tile(A* s, const Tile& of_chunk, Slot&) {
    const Tile at = moved(of_chunk, first_);
    constexpr A kLeftOut = std::numeric_limits<A>::quiet_NaN();
    const auto [i0, n, j0, m] = at;
    GSSF_VECTORIZED(nan_ahead_of, s, n, m);
    left_out_.mask(s, at, kLeftOut);
    for (int64_t i = i0; listed_.starts && i < i0 + n; ++i) {
      const int64_t* const end = listed_.cols + listed_.starts[i + 1];
      for (const int64_t* e = std::lower_bound(listed_.cols + listed_.starts[i], end, j0); e < end && *e < j0 + m; ++e)
        s[(i - i0) * kTileMost + *e - j0] = kLeftOut;
    }
    count(rows_, i0, n, [&](const int64_t* starts, int64_t* bins, int64_t* greater, int64_t* reaching) {
      GSSF_VECTORIZED(count_rows_of, s, n, m, rows_.levels() + rows_.starts()[i0], starts, bins, greater, reaching);
    });
    if (!cols_) return;
    if (cols_->most() <= 1) count_columns(s, at);
    else
      count(*cols_, j0, m, [&](const int64_t* starts, int64_t* bins, int64_t* greater, int64_t* reaching) {
        GSSF_VECTORIZED(count_column_levels_of, s, n, m, cols_->levels() + cols_->starts()[j0], starts, bins, greater,
                        reaching);
      });
  }
  static void fold_rows(const Tile&, const Slot&) {}
  static void fold_cols(const Tile&, const Slot&) {}

 private:
  // Calls f with the starts of anchors anchor .. anchor + size, from 0, and zeros to be counted up.
  template <class F>
  static void count(Counted<A>& of, int64_t anchor, int64_t size, const F& f) {
    const int64_t first = of.starts()[anchor], last = of.starts()[anchor + size];
    std::vector<int64_t> starts(size + 1), counts(2 * (last - first)), bins(2 * (of.most() + 1));
    for (int64_t i = 0; i <= size; ++i) starts[i] = of.starts()[anchor + i] - first;
    f(starts.data(), bins.data(), counts.data(), counts.data() + last - first);
    of.add(anchor, first, last, counts.data(), counts.data() + last - first);
  }

  // Columns of at most one level each.
  void count_columns(const A* s, const Tile& at) {
    using Lane = typename Simd<A>::Lane;
    PerAnchor<A> level;
    PerAnchor<Lane> greater, reaching;
    level.fill(std::numeric_limits<A>::infinity());
    greater.fill(0), reaching.fill(0);
    const int64_t* starts = cols_->starts() + at.j0;
    for (int64_t j = 0; j < at.m; ++j)
      if (starts[j] < starts[j + 1]) level[j] = cols_->levels()[starts[j]];
    GSSF_VECTORIZED(count_columns_of, s, at.n, at.m, level.data(), greater.data(), reaching.data());
    std::vector<int64_t> counts;
    counts.reserve(2 * at.m);
    for (const auto* each : {&greater, &reaching})
      for (int64_t j = 0; j < at.m; ++j)
        if (starts[j] < starts[j + 1]) counts.push_back((*each)[j]);
    const int64_t count = starts[at.m] - starts[0];
    cols_->add(at.j0, starts[0], starts[at.m], counts.data(), counts.data() + count);
  }

  LeftOut<A> left_out_;
  Listed listed_;
  Counted<A>& rows_;
  Counted<A>* cols_;
  int64_t first_ = 0;
};

// starts: where the levels, or the pairs, of each anchor begin.
void check_starts(const char* name, const std::optional<Tensor>& starts, int64_t anchors, int64_t count) {
  bool valid = starts ? starts->dim() == 1 && starts->size(0) == anchors + 1 && starts->scalar_type() == at::kLong
                      : count == anchors;
  if (valid && starts) {
    const int64_t* s = starts->const_data_ptr<int64_t>();
    valid = s[0] == 0 && s[anchors] == count;
    for (int64_t i = 0; i < anchors; ++i) valid = valid && s[i] <= s[i + 1];
  }
  TORCH_CHECK_VALUE(valid, "gssf::score_counts: expected ", name, ", ascending from 0 to the number of its entries");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_counts(
    const Tensor& a, const Tensor& b, const Tensor& row_levels, const std::optional<Tensor>& row_starts,
    const std::optional<Tensor>& col_levels, const std::optional<Tensor>& col_starts,
    const std::optional<Tensor>& a_ids, const std::optional<Tensor>& b_ids, bool exclude_self,
    const std::optional<Tensor>& pair_starts, const std::optional<Tensor>& pair_cols) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type() &&
                        at::isFloatingType(a.scalar_type()),
                    "gssf::score_counts: expected a [N, D] and b [M, D] of one floating dtype, got ", a.sizes(),
                    " and ", b.sizes());
  const int64_t n = a.size(0), m = b.size(0);
  const auto score = score_options(a), index = score.dtype(at::kLong);
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional(t->contiguous()) : std::nullopt;
  };
  TORCH_CHECK_VALUE(a_ids.has_value() == b_ids.has_value() && (!a_ids || (a_ids->numel() == n && b_ids->numel() == m)),
                    "gssf::score_counts: expected a_ids [N] and b_ids [M], or neither");
  TORCH_CHECK_VALUE(row_levels.dim() == 1 && row_levels.dtype() == score.dtype() &&
                        (!col_levels || (col_levels->dim() == 1 && col_levels->dtype() == score.dtype())),
                    "gssf::score_counts: expected levels of the scores' dtype");
  const Tensor levels = row_levels.contiguous();
  const Tensor of_columns = col_levels ? col_levels->contiguous() : at::empty({0}, score);
  const auto starts = contiguous(row_starts), column_starts = contiguous(col_starts);
  check_starts("row_starts", starts, n, levels.numel());
  if (col_levels) check_starts("col_starts", column_starts, m, of_columns.numel());
  const auto pairs = contiguous(pair_starts), columns_of_pairs = contiguous(pair_cols);
  TORCH_CHECK_VALUE(pairs.has_value() == columns_of_pairs.has_value(),
                    "gssf::score_counts: expected pair_starts [N + 1] and pair_cols, or neither");
  if (pairs) {
    check_starts("pair_starts", pairs, n, columns_of_pairs->numel());
    const int64_t *first = pairs->const_data_ptr<int64_t>(), *cols = columns_of_pairs->const_data_ptr<int64_t>();
    bool valid = true;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t e = first[i]; e < first[i + 1]; ++e)
        valid = valid && cols[e] >= 0 && cols[e] < m && (e == first[i] || cols[e - 1] <= cols[e]);
    TORCH_CHECK_VALUE(valid, "gssf::score_counts: expected pair_cols in 0..M-1, ascending within each row");
  }
  const std::array<Tensor, 4> out{at::zeros(levels.sizes(), index), at::zeros(levels.sizes(), index),
                                  at::zeros(of_columns.sizes(), index), at::zeros(of_columns.sizes(), index)};
  if (n > 0 && m > 0)
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      using Lane = typename Simd<A>::Lane;
      std::pair<std::vector<Lane>, std::vector<Lane>> ids;
      if (a_ids) ids = dense_ids<Lane>(a_ids->contiguous(), b_ids->contiguous());
      Counted<A> rows(levels, starts, n, out[0], out[1]);
      Counted<A> cols(of_columns, col_levels ? column_starts : std::optional<Tensor>(at::zeros({m + 1}, index)), m,
                      out[2], out[3]);
      const Listed listed =
          pairs ? Listed{pairs->const_data_ptr<int64_t>(), columns_of_pairs->const_data_ptr<int64_t>()} : Listed{};
      CountScores<A> epilogue({ids.first, ids.second, exclude_self}, listed, rows, col_levels ? &cols : nullptr);
      const Tensor x = a.to(c10::CppTypeToScalarType<A>::value).contiguous();
      Tensor panels;
      for_each_chunk(b, sizeof(A), [&](int64_t first, const Tensor& y) {
        epilogue.begin(first);
        sweep(Panels<A>(x, y, &panels), Blocks(n, kTileMost), Blocks(y.size(0), tile_cols(y.size(0))), epilogue);
      });
    });
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) { library.impl("score_counts", score_counts); }

}  // namespace gssf
