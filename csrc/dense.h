// What the passes over a chunk of scores hand to their vector kernels (vector_dense.h).
#pragma once

#include <cstdint>

namespace gssf {

// A pass takes a chunk in tiles of this size, whatever the thread count: the one table of it.
constexpr int64_t kPassRows = 64, kPassCols = 512;

// Maxima and sums of exponentials of one tile, of its rows and its columns.
template <class A>
struct LogSums {
  A row_max[kPassRows], row_sum[kPassRows], col_max[kPassCols], col_sum[kPassCols];
};

// One direction of a softmax over logits t, p = e^(t - max - log), and the gradient of its log-sum. Without grad it
// is left out.
template <class A>
struct Softmax {
  const A *max, *log, *grad;
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
  A row_sum[kPassRows], row_slope[kPassRows], along[kPassRows], col_sum[kPassCols], col_slope[kPassCols];
};

// A tile of e = (f - u) - lam (w - u), off the diagonal i - j = offset, for f, u and w [n, m] that are symmetric as a
// whole and have columns from the chunk's first row on: the first `once` columns count once, the others twice.
template <class A>
struct RelationTile {
  A* f;
  const A *u, *w;
  int64_t ld, n, m, once, offset;
  A lam;
  Kind kind;      // abs or square
  bool gradient;  // f becomes the slope at e, each place once
};

// Of the rows of a tile: f(e), f(w - u), and slope * (w - u).
template <class A>
struct RelationSums {
  A student[kPassRows], teachers[kPassRows], along[kPassRows];
};

}  // namespace gssf
