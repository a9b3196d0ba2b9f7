// a and b of a sweep, converted and packed so that tiles of s = a bᵀ can be computed.
#pragma once

#include <ATen/record_function.h>

#include <vector>

#include "bf16.h"

namespace gssf {

// Whether x and y have the same memory, shape, strides and dtype.
inline bool same(const at::Tensor& x, const at::Tensor& y) {
  return x.const_data_ptr() == y.const_data_ptr() && x.sizes() == y.sizes() && x.strides() == y.strides() &&
         x.scalar_type() == y.scalar_type();
}

// Calls f(A()), where A is the type of the scores of a.
template <class F>
void dispatch(const at::Tensor& a, F f) {
  if (a.scalar_type() == at::kDouble) f(double());
  else f(float());
}

inline at::TensorOptions score_options(const at::Tensor& a) {
  return a.options().dtype(a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Whether a and b are multiplied as bf16: if they are bf16, or if they are fp32 and PyTorch's products round it to bf16
// too.
bool rounds(const at::Tensor& a);

// Scores of rows i0 .. i0 + n and columns j0 .. j0 + m.
struct Tile {
  int64_t i0, n, j0, m;
};

// Products in A: of fp32 or fp64, and of fp16 and bf16, which convert to fp32 exactly.
template <class A>
class Panels {
 public:
  using Scalar = A;

  // memory: where b's panels are made, as packed() has it.
  Panels(const at::Tensor& a, const at::Tensor& b, at::Tensor* memory = nullptr) {
    RECORD_FUNCTION("gssf::stage::pack", {});
    a_ = a.to(c10::CppTypeToScalarType<A>::value).contiguous();
    b_ = packed<A>(b.t(), memory);
  }

  // s [n, m], rows kTileMost apart.
  void tile(const Tile& at, A* s) const {
    const int64_t depth = a_.size(1);
    const Product<A> product{.a = a_.template const_data_ptr<A>() + at.i0 * depth,
                             .panels = b_.template const_data_ptr<A>() + at.j0 * depth,
                             .c = s,
                             .n = at.n,
                             .k = depth,
                             .m = at.m,
                             .a_row = depth,
                             .a_step = 1,
                             .panel = depth * kPanel<A>,
                             .c_row = kTileMost,
                             .add = false};
    GSSF_VECTORIZED(product_of, product);
  }
  static void leave_thread() {}

 private:
  at::Tensor a_, b_;
};

// x̂, which is x rounded to bf16, with ‖x‖ and ‖x - x̂‖ of every row, never too small.
struct Rounded {
  at::Tensor values;  // [N, padded] bf16
  std::vector<float> norm, residue;
};

// Products on bf16 units: exact products of bf16 numbers, summed in fp32.
class Bf16Panels {
 public:
  using Scalar = float;

  Bf16Panels(const at::Tensor& a, const at::Tensor& b);
  const Rounded& a() const { return a_; }
  const Rounded& b() const { return b_; }
  int64_t depth() const { return a_.values.size(1); }

  void tile(const Tile& at, float* s) const;
  static void leave_thread() { at::native::cpublas::brgemm_release(); }

 private:
  Rounded a_, b_;
  at::Tensor panels_;
};

}  // namespace gssf
