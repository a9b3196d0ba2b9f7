// gssf::pair_scores and its backward on the CPU.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "edges.h"
#include "exact.h"

#define GSSF_KERNELS "vector_pairs.h"
#include "isa.h"

namespace gssf {

using at::Tensor;

namespace {

// The least number of rows per thread, so that small problems start no threads.
int64_t grain(int64_t dim) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1)); }

void check_inputs(const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                    "a, b: expected [N, D] and [M, D] of one dtype, got ", a.sizes(), " and ", b.sizes());
}

}  // namespace

Tensor pair_scores(const Tensor& a_in, const Tensor& b_in, const Tensor& rows_in, const Tensor& cols_in, bool exact) {
  check_inputs(a_in, b_in);
  const Tensor a = a_in.contiguous(), b = b_in.contiguous();
  const Tensor rows = rows_in.contiguous(), cols = cols_in.contiguous();
  check_edges(rows, cols, a.size(0), b.size(0));
  if (exact && certifies(a, b)) return exact_pair_scores(a, b, rows, cols);
  Tensor out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, a.scalar_type(), "pair_scores", [&] {
    using A = Accumulate<scalar_t>;
    out = at::empty({rows.numel()}, a.options().dtype(c10::CppTypeToScalarType<A>::value));
    at::parallel_for(0, rows.numel(), grain(a.size(1)), [&](int64_t begin, int64_t end) {
      GSSF_VECTORIZED(pair_scores_run, a.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(),
                      rows.const_data_ptr<int64_t>(), cols.const_data_ptr<int64_t>(), out.mutable_data_ptr<A>(),
                      a.size(1), begin, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_scores_backward(const Tensor& grad_out, const Tensor& rows_in, const Tensor& cols_in,
                                                const Tensor& a_in, const Tensor& b_in, c10::List<bool> needs) {
  check_inputs(a_in, b_in);
  TORCH_CHECK_VALUE(needs.size() == 2, "needs: expected 2 flags, got ", needs.size());
  const Tensor a = a_in.contiguous(), b = b_in.contiguous();
  const Tensor rows = rows_in.contiguous(), cols = cols_in.contiguous();
  check_edges(rows, cols, a.size(0), b.size(0));
  TORCH_CHECK_VALUE(grad_out.sizes() == rows.sizes(), "grad: expected shape ", rows.sizes(), ", got ",
                    grad_out.sizes());
  Tensor da = needs[0] ? at::empty(a.sizes(), a.options()) : at::empty({0}, a.options());
  Tensor db = needs[1] ? at::empty(b.sizes(), b.options()) : at::empty({0}, b.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, a.scalar_type(), "pair_scores_backward", [&] {
    using A = Accumulate<scalar_t>;
    const Tensor dscores = grad_out.to(c10::CppTypeToScalarType<A>::value).contiguous();
    auto gradient = [&](const Tensor& destination, const Tensor& source, const Tensor& x, Tensor& out) {
      const Groups groups(destination.const_data_ptr<int64_t>(), source.const_data_ptr<int64_t>(), rows.numel(),
                          out.size(0));
      at::parallel_for(0, out.size(0), grain(out.size(1)), [&](int64_t begin, int64_t end) {
        GSSF_VECTORIZED(gather_run, x.const_data_ptr<scalar_t>(), source.const_data_ptr<int64_t>(),
                        dscores.const_data_ptr<A>(), groups, out.mutable_data_ptr<scalar_t>(), out.size(1), begin, end);
      });
    };
    if (needs[0]) gradient(rows, cols, b, da);
    if (needs[1]) gradient(cols, rows, a, db);
  });
  return {da, db};
}

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("pair_scores", pair_scores);
  library.impl("pair_scores_backward", pair_scores_backward);
}

}  // namespace gssf
