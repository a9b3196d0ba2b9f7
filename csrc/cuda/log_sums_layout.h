// The rule by which partial log-sums merge. tests/native/test_hopper_layout.py holds it to brute force.
#pragma once

#include <limits>

#include "sweep_layout.h"

namespace gssf::hopper {

// The largest of some numbers t and Σ e^(t - largest). -inf and 0: none, or all are -inf. An infinite largest is not
// taken off, and NaN among the numbers makes it inf, so that no finite one takes its place.
struct LogSum {
  float top, sum;
};

// One partial log-sum for each line (a row or a column) and each part (a tile on that line), as [part, line].
struct LogPartials {
  float *top, *sum;
};

// Both together. exponential: e^x.
template <class Exponential>
GSSF_BOTH LogSum join_logs(LogSum x, LogSum y, Exponential exponential) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  const float top = x.top > y.top ? x.top : y.top;
  const auto moved = [&](LogSum part) {
    if (part.top == none) return 0.0f;
    return part.top == top ? part.sum : part.sum * exponential(part.top - top);
  };
  return {top, moved(x) + moved(y)};
}

}  // namespace gssf::hopper
