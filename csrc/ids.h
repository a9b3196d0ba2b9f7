// Ids as small numbers, one for each distinct id.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace gssf {

// Ids as 0, 1, 2, … in order of value, so that vectors of ids have as many lanes as vectors of scores. b's are followed
// by 64 times -1, which no row of a has.
template <class Lane>
std::pair<std::vector<Lane>, std::vector<Lane>> dense_ids(const at::Tensor& a_ids, const at::Tensor& b_ids) {
  const int64_t n = a_ids.numel(), m = b_ids.numel();
  const int64_t *a = a_ids.const_data_ptr<int64_t>(), *b = b_ids.const_data_ptr<int64_t>();
  std::vector<int64_t> values(a, a + n);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  auto rank = [&](int64_t id) {
    const auto value = std::lower_bound(values.begin(), values.end(), id);
    return value != values.end() && *value == id ? static_cast<Lane>(value - values.begin()) : Lane(-1);
  };
  std::pair<std::vector<Lane>, std::vector<Lane>> out{std::vector<Lane>(n), std::vector<Lane>(m + 64, Lane(-1))};
  std::transform(a, a + n, out.first.begin(), rank);
  std::transform(b, b + m, out.second.begin(), rank);
  return out;
}

}  // namespace gssf
