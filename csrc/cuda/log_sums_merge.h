// After the sweep for log-sums: the merge of its partials, and their logarithms.
#pragma once

#include "log_sums_layout.h"
#include "sweep_merge.h"

namespace gssf::hopper {

struct LogMerge : Lines {
  using Result = LogSum;

  LogPartials rows, cols;
  float *row_max, *row_log, *col_max, *col_log;
  bool last;  // slab: only then columns become logarithms

  GSSF_DEVICE LogSum nothing() const { return {kNone, 0.0f}; }

  GSSF_DEVICE LogSum fold(bool of_rows, int64_t line, int64_t lines, int begin, int end) const {
    const LogPartials& parts = of_rows ? rows : cols;
    LogSum result = nothing();
    for (int part = begin; part < end; ++part) {
      const int64_t at = part * lines + line;
      result = join(result, {parts.top[at], parts.sum[at]});
    }
    return result;
  }

  GSSF_DEVICE LogSum join(LogSum earlier, LogSum later) const {
    return join_logs(earlier, later, [](float x) { return chip::exponential(x); });
  }

  GSSF_DEVICE LogSum before(int64_t j) const { return {col_max[j], col_log[j]}; }

  GSSF_DEVICE void write_row(int64_t i, LogSum of) const { row_max[i] = of.top, row_log[i] = chip::logarithm(of.sum); }
  GSSF_DEVICE void write_column(int64_t j, LogSum of) const {
    col_max[j] = of.top, col_log[j] = last ? chip::logarithm(of.sum) : of.sum;
  }
};

}  // namespace gssf::hopper
