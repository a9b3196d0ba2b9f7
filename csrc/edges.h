// Edges: lists of pairs (rows[e], cols[e]) of a row of a and a row of b; one with -1 at either end is skipped.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <tuple>

#include "types.h"

namespace gssf {

// Raises unless rows and cols are int64 vectors of one length with values in -1..n-1 and -1..m-1.
inline void check_edges(const at::Tensor& rows, const at::Tensor& cols, int64_t n, int64_t m) {
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.sizes() == cols.sizes() && rows.scalar_type() == at::kLong &&
                        cols.scalar_type() == at::kLong,
                    "rows, cols: expected two int64 vectors of one length, got ", rows.sizes(), " and ", cols.sizes());
  const int64_t *i = rows.const_data_ptr<int64_t>(), *j = cols.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < rows.numel(); ++e)
    TORCH_CHECK_VALUE(i[e] >= -1 && i[e] < n && j[e] >= -1 && j[e] < m, "rows, cols: expected pairs inside [", n, ", ",
                      m, "], got (", i[e], ", ", j[e], ") at place ", e);
}

inline Groups::Groups(const int64_t* destination, const int64_t* source, int64_t edges, int64_t destinations)
    : first(destinations + 1, 0), edge(edges) {
  const auto kept = [&](int64_t e) { return destination[e] >= 0 && source[e] >= 0; };
  for (int64_t e = 0; e < edges; ++e)
    if (kept(e)) ++first[destination[e] + 1];
  for (int64_t d = 0; d < destinations; ++d) first[d + 1] += first[d];
  std::vector<int64_t> place(first.begin(), first.end() - 1);
  for (int64_t e = 0; e < edges; ++e)
    if (kept(e)) edge[place[destination[e]]++] = e;
}

// a[rows[e]] · b[cols[e]] for every e, with `exact` as exact.h has it if it certifies(a, b); and da and db, each empty
// if `needs` is false. In pairs.cpp.
at::Tensor pair_scores(const at::Tensor& a, const at::Tensor& b, const at::Tensor& rows, const at::Tensor& cols,
                       bool exact = false);
std::tuple<at::Tensor, at::Tensor> pair_scores_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                                                        const at::Tensor& cols, const at::Tensor& a,
                                                        const at::Tensor& b, c10::List<bool> needs);

}  // namespace gssf
