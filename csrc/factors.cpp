// Sides of a sweep that are rounded to bf16.
#define GSSF_KERNELS "vector_epilogues.h"
#include "factors.h"

#include <ATen/Context.h>

#include <cmath>

namespace gssf {
namespace {

using at::Tensor;

// x [N, D] rounded, its rows padded with zeros to whole matrix instructions. What is bf16 already has no bounds.
Rounded rounded(const Tensor& x) {
  const int64_t n = x.size(0), depth = x.size(1), padded = ceil_div(std::max<int64_t>(depth, 1), 32) * 32;
  Rounded out{at::empty({n, padded}, x.options().dtype(at::kBFloat16)), std::vector<float>(n), std::vector<float>(n)};
  auto* values = reinterpret_cast<uint16_t*>(out.values.mutable_data_ptr<at::BFloat16>());
  // Sums of squares in fp32 are off by a relative depth * 2^-24, and by 2^-126 for every square that is subnormal.
  const double more = 1 + static_cast<double>(depth + 8) * 0x1p-23, least = static_cast<double>(depth) * 0x1p-125;
  const auto bound = [&](float squares) {
    return static_cast<float>(std::sqrt(squares * more + least) * (1 + 0x1p-20));
  };
  const auto run = [&](const auto* data) {
    at::parallel_for(0, n, ceil_div(1 << 14, padded), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        float squares[2] = {};
        GSSF_VECTORIZED(round_row_of, data + i * depth, depth, padded, values + i * padded, squares);
        out.norm[i] = bound(squares[0]), out.residue[i] = bound(squares[1]);
      }
    });
  };
  const Tensor rows = x.contiguous();
  if (x.scalar_type() == at::kFloat) run(rows.const_data_ptr<float>());
  else if (x.scalar_type() == at::kHalf) run(rows.const_data_ptr<at::Half>());
  else run(rows.const_data_ptr<at::BFloat16>());
  return out;
}

}  // namespace

Bf16Unit bf16_unit() {
#ifdef GSSF_X86_LEVELS
  static const Bf16Unit unit = [] {
    if (isa() != Isa::v4 || !at::globalContext().userEnabledMkldnn()) return Bf16Unit::none;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("amx-bf16")) return Bf16Unit::amx;
    return __builtin_cpu_supports("avx512bf16") ? Bf16Unit::avx512_bf16 : Bf16Unit::none;
  }();
  return unit;
#else
  return Bf16Unit::none;
#endif
}

Bf16Panels::Bf16Panels(const Tensor& a, const Tensor& b) : a_(rounded(a)), b_(rounded(b)) {
  const int64_t m = b.size(0), padded = depth(), count = ceil_div(m, kWidth);
  panels_ = at::empty({count, padded / 2, kWidth, 2}, b_.values.options());
  const auto* from = reinterpret_cast<const uint32_t*>(b_.values.const_data_ptr<at::BFloat16>());  // two channels each
  auto* to = reinterpret_cast<uint32_t*>(panels_.mutable_data_ptr<at::BFloat16>());
  const int64_t pairs = padded / 2;
  at::parallel_for(0, count, ceil_div(1 << 14, kWidth * padded), [&](int64_t p, int64_t end) {
    for (; p < end; ++p) {
      uint32_t* panel = to + p * pairs * kWidth;
      const int64_t width = std::min(kWidth, m - p * kWidth);
      if (width < kWidth) std::fill_n(panel, pairs * kWidth, 0u);
      GSSF_VECTORIZED(pack_pairs_of, from + p * kWidth * pairs, pairs, pairs, width, panel, kWidth);
    }
  });
}

void Bf16Panels::tile(const Tile& at, float* s) const {
  const int64_t padded = depth();
  const at::BFloat16* rows = a_.values.const_data_ptr<at::BFloat16>() + at.i0 * padded;
  const at::BFloat16* panels = panels_.const_data_ptr<at::BFloat16>() + at.j0 * padded;
  for (int64_t j = 0; j < at.m; j += kWidth)
    at::native::cpublas::brgemm(at.n, kWidth, padded, padded, kWidth, kTileMost, false, rows, panels + j * padded,
                                s + j);
}

}  // namespace gssf
