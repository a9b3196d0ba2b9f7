// gssf::project and its backward on the CPU: one pass over x, in chunks of rows that stay in L2.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#define GSSF_KERNELS "vector_project.h"
#include "isa.h"

namespace gssf {
namespace {

using at::Tensor;

constexpr int64_t kSplitRows = 512;  // rows summed into one partial ddiag, dblocks: fixed, so deterministic

template <class A>
Weights<A> make_weights(int64_t dim, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                        const std::optional<Tensor>& permutation, bool normalize, bool backward) {
  const auto dtype = c10::CppTypeToScalarType<A>::value;
  Weights<A> out;
  out.dim = dim, out.normalize = normalize;
  if (diag) {
    const Tensor wide = diag->to(dtype).contiguous();
    out.diag.assign(wide.const_data_ptr<A>(), wide.const_data_ptr<A>() + dim);
  }
  if (blocks) {
    out.groups = blocks->size(0), out.width = blocks->size(1);
    out.ld = (out.width / Simd<A>::lanes + 2) * Simd<A>::lanes;
    const auto padded = [&](const Tensor& wide) {
      std::vector<A> rows(dim * out.ld, A(0));
      for (int64_t k = 0; k < dim; ++k)
        std::copy_n(wide.const_data_ptr<A>() + k * out.width, out.width, rows.data() + k * out.ld);
      return rows;
    };
    if (backward) out.transposed = padded(blocks->transpose(1, 2).to(dtype).contiguous());
    else out.blocks = padded(blocks->to(dtype).contiguous());
  }
  if (permutation) {
    const Tensor order = permutation->contiguous();
    out.permutation.assign(order.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>() + dim);
    for (const int64_t channel : out.permutation)
      TORCH_CHECK_VALUE(channel >= 0 && channel < dim, "permutation: expected channels 0..", dim - 1, ", got ", channel);
  }
  return out;
}

void check_weights(const Tensor& x, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
                   const std::optional<Tensor>& permutation) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected shape [N, D], got ", x.sizes());
  const int64_t dim = x.size(1);
  TORCH_CHECK_VALUE(!diag || diag->numel() == dim, "diag: expected shape [", dim, "]");
  TORCH_CHECK_VALUE(!blocks || (blocks->dim() == 3 && blocks->size(1) == blocks->size(2) && blocks->size(0) * blocks->size(1) == dim),
              "blocks: expected shape [G, b, b] with G*b = ", dim);
  TORCH_CHECK_VALUE(!permutation || permutation->numel() == dim, "permutation: expected shape [", dim, "]");
}

Tensor project(const Tensor& x_in, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
               const std::optional<Tensor>& permutation, bool normalize) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous();
  Tensor p = at::empty(x.sizes(), x.options());
  const int64_t rows = x.size(0), dim = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "project", [&] {
    using A = Accumulate<scalar_t>;
    const Weights<A> weights = make_weights<A>(dim, diag, blocks, permutation, normalize, false);
    at::parallel_for(0, (rows + kChunkRows - 1) / kChunkRows, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(weights, false);
      for (int64_t first = begin * kChunkRows; first < std::min(rows, end * kChunkRows); first += kChunkRows)
        GSSF_VECTORIZED(project_run, x.const_data_ptr<scalar_t>() + first * dim, weights, scratch,
                    p.mutable_data_ptr<scalar_t>() + first * dim, std::min(kChunkRows, rows - first));
    });
  });
  return p;
}

std::tuple<Tensor, Tensor, Tensor> project_backward(
    const Tensor& grad_in, const Tensor& x_in, const std::optional<Tensor>& diag, const std::optional<Tensor>& blocks,
    const std::optional<Tensor>& permutation, bool normalize, c10::List<bool> needs) {
  check_weights(x_in, diag, blocks, permutation);
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous();
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && needs.size() == 3,
              "grad: expected shape ", x.sizes(), " and x's dtype, got ", grad.sizes());
  const bool need_diag = diag && needs[1], need_blocks = blocks && needs[2];
  const int64_t rows = x.size(0), dim = x.size(1);
  const int64_t diag_size = need_diag ? dim : 0, blocks_size = need_blocks ? blocks->numel() : 0;
  const int64_t splits = (rows + kSplitRows - 1) / kSplitRows, partial_size = diag_size + blocks_size;
  Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options()), ddiag, dblocks;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "project_backward", [&] {
    using A = Accumulate<scalar_t>;
    const Weights<A> weights = make_weights<A>(dim, diag, blocks, permutation, normalize, true);
    const auto wide = x.options().dtype(c10::CppTypeToScalarType<A>::value);
    const Tensor partial = at::zeros({splits, partial_size}, wide);
    at::parallel_for(0, splits, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(weights, true);
      for (int64_t split = begin; split < end; ++split) {
        A* sums = partial.mutable_data_ptr<A>() + split * partial_size;
        for (int64_t first = split * kSplitRows; first < std::min(rows, (split + 1) * kSplitRows); first += kChunkRows)
          GSSF_VECTORIZED(backward_run, grad.const_data_ptr<scalar_t>() + first * dim, x.const_data_ptr<scalar_t>() + first * dim, weights,
                       scratch, needs[0] ? dx.mutable_data_ptr<scalar_t>() + first * dim : nullptr,
                       need_diag ? sums : nullptr, need_blocks ? sums + diag_size : nullptr,
                       std::min(kChunkRows, rows - first));
      }
    });
    const Tensor total = at::zeros({partial_size}, wide);
    A* sum = total.mutable_data_ptr<A>();
    at::parallel_for(0, partial_size, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t split = 0; split < splits; ++split) {
        const A* terms = partial.const_data_ptr<A>() + split * partial_size;
        for (int64_t k = begin; k < end; ++k) sum[k] += terms[k];
      }
    });
    ddiag = total.narrow(0, 0, diag_size).to(diag ? diag->scalar_type() : x.scalar_type(), false, true);
    dblocks = total.narrow(0, diag_size, blocks_size).to(blocks ? blocks->scalar_type() : x.scalar_type(), false, true);
    if (need_blocks) dblocks = dblocks.view(blocks->sizes());
  });
  return {dx, ddiag, dblocks};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("project", project);
  library.impl("project_backward", project_backward);
}

}  // namespace gssf
