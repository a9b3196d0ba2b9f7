// The passes of the dense losses over one chunk of scores on the CPU: see gssf_kernels/dense.py.
//
// A chunk s [R, M] is divided into tiles of a fixed size; threads write each tile's partials to separate places, and
// these are then merged in the tiles' order, so the thread count changes no bit.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "dense.h"

#define GSSF_KERNELS "vector_dense.h"
#include "isa.h"

namespace gssf {
namespace {

using at::Tensor;

struct Tiles {
  int64_t n, m, down, across;
  explicit Tiles(const Tensor& s)
      : n(s.size(0)), m(s.size(1)), down(ceil_div(n, kPassRows)), across(ceil_div(m, kPassCols)) {}
  // f(tile, i0, rows, j0, columns) for every tile, from several threads.
  template <class F>
  void each(const F& f) const {
    at::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i0 = t / across * kPassRows, j0 = t % across * kPassCols;
        f(t, i0, std::min(kPassRows, n - i0), j0, std::min(kPassCols, m - j0));
      }
    });
  }
  // out [n] = the partials [kPassRows] of each row of tiles, added up in order.
  template <class A>
  void fold_rows(const std::vector<A>& partials, A* out) const {
    std::fill_n(out, n, A(0));
    for (int64_t t = 0; t < down * across; ++t) {
      const int64_t i0 = t / across * kPassRows;
      for (int64_t i = 0; i < std::min(kPassRows, n - i0); ++i) out[i0 + i] += partials[t * kPassRows + i];
    }
  }
};

void check_chunk(const Tensor& s) {
  TORCH_CHECK_VALUE(s.dim() == 2 && s.stride(1) == 1, "s: expected a chunk [R, M] with adjacent columns, got ",
                    s.sizes(), " with strides ", s.strides());
}

// The data of an optional vector [size] of A, or null.
template <class A>
A* data(const Tensor& t, int64_t size, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size && t.is_contiguous(), name, ": expected [", size,
                    "] and contiguous, got ", t.sizes());
  return const_cast<A*>(t.const_data_ptr<A>());
}
template <class A>
A* data(const std::optional<Tensor>& t, int64_t size, const char* name) {
  return t ? data<A>(*t, size, name) : nullptr;
}

// (max, Σ e^(t - max)) merged with those of other t; max = -inf: of no t.
template <class A>
void merge(A& max, A& sum, A other_max, A other_sum) {
  if (other_max == -std::numeric_limits<A>::infinity()) return;
  if (other_max == max) {
    sum += other_sum;
  } else if (other_max > max) {
    sum = sum * std::exp(max - other_max) + other_sum;
    max = other_max;
  } else {
    sum += other_sum * std::exp(other_max - max);
  }
}

template <class Name>
Name named(std::string_view text, std::initializer_list<std::pair<std::string_view, Name>> names) {
  for (const auto& [name, value] : names)
    if (name == text) return value;
  TORCH_CHECK_VALUE(false, "no such name: ", text);
}

// A statistic of one direction by class: [C, size] with any stride of classes, or [size] for one class.
template <class A>
struct Statistic {
  A* data = nullptr;
  int64_t step = 0;
};
template <class A>
Statistic<A> statistic(const Tensor& t, int64_t classes, int64_t size, const char* name) {
  const bool one = classes == 1 && t.dim() == 1;
  TORCH_CHECK_VALUE(
      (one || (t.dim() == 2 && t.size(0) == classes)) && t.size(-1) == size && (size <= 1 || t.stride(-1) == 1), name,
      ": expected [", classes, ", ", size, "] with adjacent entries, got ", t.sizes());
  return {const_cast<A*>(t.const_data_ptr<A>()), one ? 0 : t.stride(0)};
}
template <class A>
Statistic<A> statistic(const std::optional<Tensor>& t, int64_t classes, int64_t size, const char* name) {
  return t ? statistic<A>(*t, classes, size, name) : Statistic<A>{};
}

// Labels and bounds of one direction, for scores by label.
template <class A>
struct Labels {
  std::vector<typename Simd<A>::Lane> numbers;
  Statistic<A> bounds;

  Labels(const std::optional<Tensor>& labels, const std::optional<Tensor>& bound, int classes, int64_t size)
      : bounds(statistic<A>(bound, classes, size, "bounds")) {
    if (!labels) return;
    const int64_t* from = data<int64_t>(labels, size, "labels");
    numbers.resize(size + Simd<A>::lanes, -1);
    for (int64_t k = 0; k < size; ++k) numbers[k] = static_cast<typename Simd<A>::Lane>(from[k]);
  }
  ByLabel<A> from(int64_t k) const {
    return {numbers.empty() ? nullptr : numbers.data() + k, bounds.data ? bounds.data + k : nullptr,
            bounds.data ? bounds.data + bounds.step + k : nullptr};
  }
};

// The op's arguments that say how scores become logits.
struct ScoreArguments {
  std::string_view score;
  at::ArrayRef<double> constants;
  const std::optional<Tensor>&row_labels, &col_labels, &row_bounds, &col_bounds;
  int64_t first;
  bool leave_out;
};

// Calls f(ScoreTag, tile_at), where tile_at(i0, n, j0, m) is a tile of s. columns: whether columns have statistics too.
template <class A, class F>
void by_score(const Tensor& s, const Tiles& tiles, const Tensor& scale, const ScoreArguments& of, bool columns, F f) {
#define GSSF_NAMED(name) {#name, Score::name},
  const auto score = named<Score>(of.score, {GSSF_SCORES(GSSF_NAMED)});
#undef GSSF_NAMED
  TORCH_CHECK_VALUE(of.row_labels.has_value() == of.col_labels.has_value() && (classes(score) == 1 || of.row_labels),
                    "labels: expected those of both sides");
  const Labels<A> rows(of.row_labels, of.row_bounds, classes(score), tiles.n),
      cols(of.col_labels, of.col_bounds, classes(score), tiles.m);
  std::array<A, 3> constants{};
  TORCH_CHECK_VALUE(of.constants.size() <= constants.size(), "constants: expected at most three");
  std::copy(of.constants.begin(), of.constants.end(), constants.begin());
  if (classes(score) == 1) constants[0] = *scale.const_data_ptr<A>();
  A* scores = const_cast<A*>(s.const_data_ptr<A>());
  const auto run = [&](auto tag) {
    f(tag, [&](int64_t i0, int64_t n, int64_t j0, int64_t m) {
      return LogitTile<A>{scores + i0 * s.stride(0) + j0,
                          s.stride(0),
                          n,
                          m,
                          j0 - i0 - of.first,
                          of.leave_out,
                          columns,
                          constants,
                          rows.from(i0),
                          cols.from(j0)};
    });
  };
#define GSSF_CASE(name) \
  case Score::name:     \
    return run(ScoreTag<Score::name>{});
  switch (score) { GSSF_SCORES(GSSF_CASE) }
#undef GSSF_CASE
}

// Writes (max, Σ e^(t - max)) of the chunk's rows, by class, and merges its columns' into col_max and col_sum.
void logsumexp_pass(const Tensor& s, const Tensor& scale, std::string_view score, at::ArrayRef<double> constants,
                    const std::optional<Tensor>& row_labels, const std::optional<Tensor>& col_labels,
                    const std::optional<Tensor>& row_bounds, const std::optional<Tensor>& col_bounds, int64_t first,
                    bool leave_out, Tensor& row_max, Tensor& row_sum, const std::optional<Tensor>& col_max,
                    const std::optional<Tensor>& col_sum) {
  check_chunk(s);
  const Tiles tiles(s);
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "logsumexp_pass", [&] {
    using A = scalar_t;
    const ScoreArguments of{score, constants, row_labels, col_labels, row_bounds, col_bounds, first, leave_out};
    by_score<A>(s, tiles, scale, of, col_max.has_value(), [&](auto tag, const auto& tile_at) {
      constexpr int C = classes(decltype(tag)::value);
      const auto row_m = statistic<A>(row_max, C, tiles.n, "row_max"),
                 row_s = statistic<A>(row_sum, C, tiles.n, "row_sum");
      const auto col_m = statistic<A>(col_max, C, tiles.m, "col_max"),
                 col_s = statistic<A>(col_sum, C, tiles.m, "col_sum");
      std::vector<LogSums<A, C>> partial(tiles.down * tiles.across);
      tiles.each([&](int64_t t, int64_t i0, int64_t n, int64_t j0, int64_t m) {
        GSSF_VECTORIZED(logsumexp_tile_of, tag, tile_at(i0, n, j0, m), partial[t]);
      });
      for (int c = 0; c < C; ++c) {
        A *max = row_m.data + c * row_m.step, *sum = row_s.data + c * row_s.step;
        std::fill_n(max, tiles.n, -std::numeric_limits<A>::infinity());
        std::fill_n(sum, tiles.n, A(0));
        for (int64_t t = 0; t < tiles.down * tiles.across; ++t) {
          const int64_t i0 = t / tiles.across * kPassRows, j0 = t % tiles.across * kPassCols;
          const auto& sums = partial[t];
          for (int64_t i = 0; i < std::min(kPassRows, tiles.n - i0); ++i)
            merge(max[i0 + i], sum[i0 + i], sums.row_max[c][i], sums.row_sum[c][i]);
          for (int64_t j = 0; col_m.data && j < std::min(kPassCols, tiles.m - j0); ++j)
            merge(col_m.data[c * col_m.step + j0 + j], col_s.data[c * col_s.step + j0 + j], sums.col_max[c][j],
                  sums.col_sum[c][j]);
        }
      }
    });
  });
}

// Overwrites s with dL/dt, or by label dL/ds; products [n] = Σ of it times s per row.
void softmax_pass(Tensor& s, const Tensor& scale, std::string_view score, at::ArrayRef<double> constants,
                  const std::optional<Tensor>& row_labels, const std::optional<Tensor>& col_labels,
                  const std::optional<Tensor>& row_bounds, const std::optional<Tensor>& col_bounds, int64_t first,
                  bool leave_out, const Tensor& row_max, const Tensor& row_log, const std::optional<Tensor>& row_grad,
                  const std::optional<Tensor>& col_max, const std::optional<Tensor>& col_log,
                  const std::optional<Tensor>& col_grad, Tensor& products) {
  check_chunk(s);
  const Tiles tiles(s);
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "softmax_pass", [&] {
    using A = scalar_t;
    const ScoreArguments of{score, constants, row_labels, col_labels, row_bounds, col_bounds, first, leave_out};
    A* sums = data<A>(products, tiles.n, "products");
    by_score<A>(s, tiles, scale, of, col_grad.has_value(), [&](auto tag, const auto& tile_at) {
      constexpr int C = classes(decltype(tag)::value);
      const auto softmax = [&](const auto& max, const auto& log, const auto& grad, int64_t size) {
        const auto m = statistic<A>(max, C, size, "max"), l = statistic<A>(log, C, size, "log");
        const auto g = statistic<A>(grad, C, size, "grad");
        TORCH_CHECK_VALUE(m.step == l.step, "softmax_pass: expected max and log of one stride");
        return Softmax<A>{m.data, l.data, g.data, m.step, g.step};
      };
      const auto rows = softmax(row_max, row_log, row_grad, tiles.n),
                 cols = softmax(col_max, col_log, col_grad, tiles.m);
      const auto from = [](Softmax<A> x, int64_t k) {
        if (x.grad) x.max += k, x.log += k, x.grad += k;
        return x;
      };
      std::vector<A> partial(tiles.down * tiles.across * kPassRows);
      tiles.each([&](int64_t t, int64_t i0, int64_t n, int64_t j0, int64_t m) {
        GSSF_VECTORIZED(softmax_tile_of, tag, tile_at(i0, n, j0, m), from(rows, i0), from(cols, j0),
                        partial.data() + t * kPassRows);
      });
      tiles.fold_rows(partial, sums);
    });
  });
}

// rows [3, R] = sums, slopes and Σ_j ds_ij s_ij of the chunk's rows; cols [2, K] += sums and slopes of columns.
void score_sums_pass(Tensor& s, const Tensor& scale, const Tensor& bias, const std::optional<Tensor>& row_positive,
                     const std::optional<Tensor>& row_weight, const std::optional<Tensor>& col_positive,
                     const std::optional<Tensor>& col_weight, const std::optional<Tensor>& row_ids,
                     const std::optional<Tensor>& col_ids, int64_t first, std::string_view kind_name,
                     std::string_view positives_name, bool gradient, Tensor& rows, Tensor& cols) {
  check_chunk(s);
  const Tiles tiles(s);
  const auto kind = named<Kind>(
      kind_name, {{"hinge", Kind::hinge}, {"softplus", Kind::softplus}, {"abs", Kind::abs}, {"square", Kind::square}});
  const auto positives = named<Positives>(
      positives_name,
      {{"include", Positives::include}, {"exclude", Positives::exclude}, {"negate", Positives::negate}});
  const int64_t with_term = cols.size(1);
  TORCH_CHECK_VALUE(with_term <= tiles.m && row_ids.has_value() == col_ids.has_value(),
                    "score_sums_pass: expected terms of at most all columns, and ids of both sides or neither");
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "score_sums_pass", [&] {
    using A = scalar_t;
    // β, or where terms are relative to positives β - positive_score.
    const auto biases = [&](const std::optional<Tensor>& positive, int64_t size, const char* name) {
      std::vector<A> out(size, *bias.const_data_ptr<A>());
      const A* positive_score = data<A>(positive, size, name);
      for (int64_t k = 0; positive_score && k < size; ++k) out[k] -= positive_score[k];
      return out;
    };
    const std::vector<A> row_bias = biases(row_positive, tiles.n, "row_positive"),
                         col_bias = biases(col_positive, with_term, "col_positive");
    const SumTerm<A> row_term{row_bias.data(), data<A>(row_weight, tiles.n, "row_weight"),
                              data<int64_t>(row_ids, tiles.n, "row_ids")};
    const SumTerm<A> col_term{col_bias.data(), data<A>(col_weight, with_term, "col_weight"),
                              data<int64_t>(col_ids, tiles.m, "col_ids")};
    const auto from = [](const SumTerm<A>& x, int64_t k) {
      return SumTerm<A>{x.bias ? x.bias + k : nullptr, x.weight ? x.weight + k : nullptr, x.ids ? x.ids + k : nullptr};
    };
    A* scores = s.mutable_data_ptr<A>();
    const A factor = *scale.const_data_ptr<A>();
    std::vector<Sums<A>> partial(tiles.down * tiles.across);
    tiles.each([&](int64_t t, int64_t i0, int64_t n, int64_t j0, int64_t m) {
      const SumTile<A> tile{scores + i0 * s.stride(0) + j0,
                            s.stride(0),
                            n,
                            m,
                            std::clamp<int64_t>(with_term - j0, 0, m),
                            j0 - i0 - first,
                            factor,
                            from(row_term, i0),
                            from(col_term, j0),
                            positives,
                            gradient};
      GSSF_VECTORIZED(sum_tile_of, kind, tile, partial[t]);
    });
    const Tensor row_out = rows.zero_(), col_out = cols;
    A *sum = row_out[0].mutable_data_ptr<A>(), *slope = row_out[1].mutable_data_ptr<A>(),
      *dscores_dot_s = row_out[2].mutable_data_ptr<A>();
    A *col_sum = col_out[0].mutable_data_ptr<A>(), *col_slope = col_out[1].mutable_data_ptr<A>();
    for (int64_t t = 0; t < tiles.down * tiles.across; ++t) {
      const int64_t i0 = t / tiles.across * kPassRows, j0 = t % tiles.across * kPassCols;
      for (int64_t i = 0; i < std::min(kPassRows, tiles.n - i0); ++i) {
        sum[i0 + i] += partial[t].row_sum[i];
        slope[i0 + i] += partial[t].row_slope[i];
        dscores_dot_s[i0 + i] += partial[t].dscores_dot_s[i];
      }
      for (int64_t j = 0; j < std::min(kPassCols, with_term - j0); ++j) {
        col_sum[j0 + j] += partial[t].col_sum[j];
        col_slope[j0 + j] += partial[t].col_slope[j];
      }
    }
  });
}

// rows [3, R] = the sums of RelationSums per row of f, u, w [R, M], whose column j is row j of the chunk, from its
// first row on.
void relation_pass(Tensor& f, const Tensor& u, const Tensor& w, const Tensor& lam, std::string_view kind_name,
                   bool gradient, Tensor& rows) {
  for (const Tensor* s : {static_cast<const Tensor*>(&f), &u, &w}) {
    check_chunk(*s);
    TORCH_CHECK_VALUE(s->sizes() == f.sizes() && s->stride(0) == f.stride(0),
                      "relation_pass: expected f, u and w of one shape and stride");
  }
  const Tiles tiles(f);
  const auto kind = named<Kind>(kind_name, {{"abs", Kind::abs}, {"square", Kind::square}});
  AT_DISPATCH_FLOATING_TYPES(f.scalar_type(), "relation_pass", [&] {
    using A = scalar_t;
    A* scores = f.mutable_data_ptr<A>();
    const A *image = u.const_data_ptr<A>(), *text = w.const_data_ptr<A>();
    const A lambda = *lam.const_data_ptr<A>();
    std::vector<RelationSums<A>> partial(tiles.down * tiles.across);
    tiles.each([&](int64_t t, int64_t i0, int64_t n, int64_t j0, int64_t m) {
      const int64_t at = i0 * f.stride(0) + j0;
      const RelationTile<A> tile{scores + at,  image + at, text + at, f.stride(0), n,       m,
                                 tiles.n - j0, j0 - i0,    lambda,    kind,        gradient};
      GSSF_VECTORIZED(relation_tile_of, tile, partial[t]);
    });
    const Tensor out = rows.zero_();
    A *student = out[0].mutable_data_ptr<A>(), *teachers = out[1].mutable_data_ptr<A>(),
      *slope_dot_gap = out[2].mutable_data_ptr<A>();
    for (int64_t t = 0; t < tiles.down * tiles.across; ++t) {
      const int64_t i0 = t / tiles.across * kPassRows;
      for (int64_t i = 0; i < std::min(kPassRows, tiles.n - i0); ++i) {
        student[i0 + i] += partial[t].student[i];
        teachers[i0 + i] += partial[t].teachers[i];
        slope_dot_gap[i0 + i] += partial[t].slope_dot_gap[i];
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("logsumexp_pass", logsumexp_pass);
  library.impl("softmax_pass", softmax_pass);
  library.impl("score_sums_pass", score_sums_pass);
  library.impl("relation_pass", relation_pass);
}

}  // namespace gssf
