// Matrix products for the sweeps: packing the right operand.
//
// These products are not a library's, because here a score's sum has a fixed order, so that equal rows have equal
// scores in any position and neither thread count nor tile size changes a bit; an operand is packed once for many
// products; and a tile is still in the cache when its epilogue runs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#ifndef GSSF_KERNELS
#define GSSF_KERNELS "vector_product.h"
#endif
#include "isa.h"

namespace gssf {

constexpr int64_t kPackPanels = 8;

// y [k, m] of any strides as panels [ceil(m / kPanel), k, kPanel] of A. memory: undefined, or the panels of an earlier
// y, which are overwritten if they are of the same k and at least as many; else it becomes the new panels.
template <class A>
at::Tensor packed(const at::Tensor& y, at::Tensor* memory = nullptr) {
  const int64_t k = y.size(0), m = y.size(1), count = ceil_div(m, kPanel<A>);
  const bool reuse = memory && memory->defined() && memory->size(0) >= count && memory->size(1) == k;
  at::Tensor out = reuse ? memory->narrow(0, 0, count)
                         : at::empty({count, k, kPanel<A>}, y.options().dtype(c10::CppTypeToScalarType<A>::value));
  if (memory && !reuse) *memory = out;
  A* panels = out.mutable_data_ptr<A>();
  const auto pack = [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    // If columns are adjacent, a task packs the panels of a few at once, row by row, as they lie in memory.
    const bool by_rows = y.stride(1) == 1;
    at::parallel_for(0, count, ceil_div(1 << 14, std::max<int64_t>(k * kPanel<A>, 1)), [&](int64_t p, int64_t end) {
      for (int64_t next; p < end; p = next) {
        next = by_rows ? std::min(p + kPackPanels, end) : p + 1;
        const int64_t j = p * kPanel<A>;
        const Packing<T, A> packing{.y = data + j * y.stride(1),
                                    .panels = panels + j * k,
                                    .k = k,
                                    .width = std::min(next * kPanel<A>, m) - j,
                                    .row = y.stride(0),
                                    .col = y.stride(1),
                                    .apart = k * kPanel<A>};
        GSSF_VECTORIZED(pack_of, packing);
      }
    });
  };
  if constexpr (std::is_same_v<A, double>) {
    pack(y.const_data_ptr<double>());
  } else if (y.scalar_type() == at::kFloat) {
    pack(y.const_data_ptr<float>());
  } else if (y.scalar_type() == at::kHalf) {
    pack(y.const_data_ptr<at::Half>());
  } else {
    pack(y.const_data_ptr<at::BFloat16>());
  }
  return out;
}

}  // namespace gssf
