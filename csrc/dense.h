// Arguments and results of the vector kernels (vector_dense.h) of the passes over a chunk of scores.
#pragma once

#include <array>
#include <cstdint>

#include "types.h"

namespace gssf {

// A pass processes a chunk in tiles of this size, whatever the thread count.
constexpr int64_t kPassRows = 64, kPassCols = 512;

// How a score becomes a logit: t = scale * s of all scores, or of those that limits do not leave out; or t = slope * (s
// - centre), where slope and centre of positives and of negatives differ.
#define GSSF_SCORES(X) X(scaled) X(limited) X(circle) X(multi_similarity)
#define GSSF_NAME(name) name,
enum class Score { GSSF_SCORES(GSSF_NAME) };
#undef GSSF_NAME
template <Score kScore>
using ScoreTag = std::integral_constant<Score, kScore>;

// Log-sums of a row: one over all of its scores, or one over its positives and one over its negatives.
constexpr int classes(Score score) { return score == Score::scaled || score == Score::limited ? 1 : 2; }

// The anchors of one direction, for scores by label. labels: numbers from 0 on, followed by a vector of -1. With mining
// a positive counts if its score is below upper, and a negative if above lower; else null. Of limited scores a negative
// counts up to upper, or always if that is null.
template <class A>
struct ByLabel {
  const typename Simd<A>::Lane* labels;
  const A *upper, *lower;
};

// A tile of s [n, m] whose scores become logits. With leave_out the score (i, j) with i - j = offset does not count; of
// limited scores it is a positive.
template <class A>
struct LogitTile {
  A* s;
  int64_t ld, n, m, offset;
  bool leave_out, columns;  // columns: whether columns have statistics too
  std::array<A, 3> constants;
  ByLabel<A> rows, cols;
};

// Maxima and sums of exponentials of one tile, of its rows and its columns.
template <class A, int kClasses>
struct LogSums {
  A row_max[kClasses][kPassRows], row_sum[kClasses][kPassRows];
  A col_max[kClasses][kPassCols], col_sum[kClasses][kPassCols];
};

// One direction of a softmax over logits t, p = e^(t - max - log), and grad, the gradient of its log-sum; class c
// begins at c * step. Without grad the direction is not computed.
template <class A>
struct Softmax {
  const A *max, *log, *grad;
  int64_t step, grad_step;
};

enum class Kind { hinge, softplus, abs, square };
enum class Positives { include, exclude, negate };

// One direction of a sum of f(scale * s + bias) and the weights of its gradient; a null bias is 0, a null weight 1.
template <class A>
struct SumTerm {
  const A *bias, *weight;
  const int64_t* ids;
};

// A tile of s [n, m] for a sum over its scores, with a term for every score of a row and one for the first `cols`
// columns. Score (i, j) is a positive where i - j = offset, or where ids are equal.
template <class A>
struct SumTile {
  A* s;
  int64_t ld, n, m, cols, offset;
  A scale;
  SumTerm<A> rows, columns;
  Positives positives;
  bool gradient;  // s becomes it
};

template <class A>
struct Sums {
  A row_sum[kPassRows], row_slope[kPassRows], dscores_dot_s[kPassRows], col_sum[kPassCols], col_slope[kPassCols];
};

// A tile of e = (f - u) - lam (w - u), off the diagonal i - j = offset, for f, u and w [n, m] that are symmetric as a
// whole and have columns from the chunk's first row on: the first `once` columns have weight 1, the others 2.
template <class A>
struct RelationTile {
  A* f;
  const A *u, *w;
  int64_t ld, n, m, once, offset;
  A lam;
  Kind kind;      // abs or square
  bool gradient;  // f becomes the slope at e, with weight 1
};

// Of the rows of a tile: f(e), f(w - u), and slope * (w - u).
template <class A>
struct RelationSums {
  A student[kPassRows], teachers[kPassRows], slope_dot_gap[kPassRows];
};

}  // namespace gssf
