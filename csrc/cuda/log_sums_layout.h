// How partials of log-sums are merged. tests/native/test_hopper_layout.py compares it with brute force.
#pragma once

#include <limits>

#include "sweep_layout.h"

namespace gssf::hopper {

// max t and Σ e^(t - max) of a set of t. -inf and 0: the set is empty, or all are -inf. An infinite max is not
// subtracted, and a NaN among the t makes max inf, so that no finite one replaces it.
struct LogSum {
  float top, sum;
};

// One partial log-sum per anchor (a row or a column) and tile of that anchor, as [tile, anchor].
struct LogPartials {
  float *top, *sum;
};

// Both merged. exponential: e^x.
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
