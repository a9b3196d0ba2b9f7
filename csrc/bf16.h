// Products on the processor's unit for bf16 numbers, summed in fp32.
//
// Products of bf16 numbers are exact in fp32, so that only the sum rounds. The unit is driven by PyTorch's
// at::native::cpublas::brgemm, which compiles a kernel per shape at first use and caches it per thread; so the shapes
// are few, and depend on the problem alone.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "product.h"

namespace gssf {

// By which unit this processor multiplies bf16 numbers faster than fp32, if by any; PyTorch's kernels use it.
enum class Bf16Unit { none, avx512_bf16, amx };
Bf16Unit bf16_unit();

// Calls f(data) with the data of x, which is fp32, fp16 or bf16.
template <class F>
void with_narrow(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) f(x.const_data_ptr<float>());
  else if (x.scalar_type() == at::kHalf) f(x.const_data_ptr<at::Half>());
  else f(x.const_data_ptr<at::BFloat16>());
}

// y [k, m] of any strides, fp32, fp16 or bf16, as panels [ceil(m / kPairPanel), padded k, kPairPanel] of bf16, in which
// every two rows are interleaved: [padded k / 2, kPairPanel, 2].
at::Tensor packed_bf16(const at::Tensor& y);

// out [n, m] fp32 = x [n, k] y or += it, x of any strides in fp32, fp16 or bf16 and rounded to bf16, y packed by
// packed_bf16().
void multiply_bf16(const at::Tensor& x, const at::Tensor& panels, at::Tensor& out, bool add);

}  // namespace gssf
