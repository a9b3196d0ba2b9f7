// a and b of a sweep, rounded to bf16.
#define GSSF_KERNELS "vector_epilogues.h"
#include "factors.h"

#include <ATen/Context.h>

#include <cmath>

namespace gssf {
namespace {

using at::Tensor;

// x [N, D] rounded, its rows padded with zeros to whole matrix instructions. For x in bf16 norm and residue mean
// nothing.
Rounded rounded(const Tensor& x) {
  const int64_t n = x.size(0), depth = x.size(1), padded = ceil_div(std::max<int64_t>(depth, 1), kPairStep) * kPairStep;
  Rounded out{at::empty({n, padded}, x.options().dtype(at::kBFloat16)), std::vector<float>(n), std::vector<float>(n)};
  auto* values = reinterpret_cast<uint16_t*>(out.values.mutable_data_ptr<at::BFloat16>());
  // Sums of squares in fp32 are off by a relative depth * 2^-24, and by 2^-126 for every square that is subnormal.
  const double upward = 1 + static_cast<double>(depth + 8) * 0x1p-23, flushed = static_cast<double>(depth) * 0x1p-125;
  const auto bound = [&](float squares) {
    return static_cast<float>(std::sqrt(squares * upward + flushed) * (1 + 0x1p-20));
  };
  const Tensor rows = x.contiguous();
  with_narrow(rows, [&](const auto* data) {
    at::parallel_for(0, n, ceil_div(1 << 14, padded), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        float squares[2] = {};
        GSSF_VECTORIZED(round_row_of, data + i * depth, depth, padded, values + i * padded, squares);
        out.norm[i] = bound(squares[0]), out.residue[i] = bound(squares[1]);
      }
    });
  });
  return out;
}

}  // namespace

// Reads the setting by backend, which the older float32MatmulPrecision sets too; reading the older one throws once both
// have been used.
bool rounds(const Tensor& a) {
  if (bf16_unit() == Bf16Unit::none) return false;
  if (a.scalar_type() == at::kBFloat16) return true;
  return a.scalar_type() == at::kFloat && bf16_unit() == Bf16Unit::amx &&
         at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
             at::Float32Precision::BF16;
}

Bf16Panels::Bf16Panels(const Tensor& a, const Tensor& b) {
  RECORD_FUNCTION("gssf::stage::pack", {});
  a_ = rounded(a);
  b_ = same(a, b) ? a_ : rounded(b);
  panels_ = packed_bf16(b_.values.t());
}

void Bf16Panels::tile(const Tile& at, float* s) const {
  const int64_t padded = depth();
  const at::BFloat16* rows = a_.values.const_data_ptr<at::BFloat16>() + at.i0 * padded;
  const at::BFloat16* panels = panels_.const_data_ptr<at::BFloat16>() + at.j0 * padded;
  for (int64_t j = 0; j < at.m; j += kPairPanel)
    at::native::cpublas::brgemm(at.n, kPairPanel, padded, padded, kPairPanel, kTileMost, false, rows,
                                panels + j * padded, s + j);
}

}  // namespace gssf
