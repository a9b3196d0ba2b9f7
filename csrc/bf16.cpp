// Products on the processor's unit for bf16 numbers.
#include "bf16.h"

#include <ATen/Context.h>

namespace gssf {
namespace {

using at::Tensor;

// The most rows and channels of one call of the unit: fixed, and threads divide the work in multiples of them, so that
// no sum depends on the thread count. A block of x and kUnitDepth channels of a panel fit in the L2 cache together.
constexpr int64_t kUnitRows = 64, kUnitDepth = 512;

// Rows of x that one task copies at once.
constexpr int64_t kTaskRows = 256;

// c [n, m] = or += a [n, depth] times `depth` channels of the panels. Strides: `panel` of panels, c_row of the rows of
// c, depth of the rows of a.
struct UnitProduct {
  const at::BFloat16 *a, *panels;
  float* c;
  int64_t n, depth, m, panel, c_row;
  bool add;

  void run() const {
    for (int64_t j = 0; j < m; j += kPairPanel)
      for (int64_t i = 0; i < n; i += kUnitRows) {
        const at::BFloat16 *rows = a + i * depth, *right = panels + j / kPairPanel * panel;
        const int64_t height = std::min(kUnitRows, n - i), width = std::min(kPairPanel, m - j);
        float* to = c + i * c_row + j;
        if (width == kPairPanel) {
          at::native::cpublas::brgemm(height, kPairPanel, depth, depth, kPairPanel, c_row, add, rows, right, to);
          continue;
        }
        alignas(64) float edge[kUnitRows * kPairPanel];  // the unit writes whole panels
        at::native::cpublas::brgemm(height, kPairPanel, depth, depth, kPairPanel, kPairPanel, false, rows, right, edge);
        for (int64_t r = 0; r < height; ++r)
          for (int64_t at = 0; at < width; ++at) {
            const float sum = edge[r * kPairPanel + at];
            to[r * c_row + at] = add ? to[r * c_row + at] + sum : sum;
          }
      }
  }
};

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

Tensor packed_bf16(const Tensor& y) {
  const int64_t k = y.size(0), m = y.size(1), padded = ceil_div(k, kPairStep) * kPairStep;
  const int64_t count = ceil_div(m, kPairPanel);
  Tensor out = at::empty({count, padded, kPairPanel}, y.options().dtype(at::kBFloat16));
  auto* panels = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<at::BFloat16>());  // two channels each
  with_narrow(y, [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    at::parallel_for(0, count, ceil_div(1 << 14, std::max<int64_t>(padded * kPairPanel, 1)),
                     [&](int64_t p, int64_t end) {
                       for (; p < end; ++p) {
                         const int64_t j = p * kPairPanel;
                         GSSF_VECTORIZED(pairs_of, Pairing<T>{.x = data + j * y.stride(1),
                                                              .out = panels + j * padded / 2,
                                                              .rows = std::min(kPairPanel, m - j),
                                                              .channels = k,
                                                              .row = y.stride(1),
                                                              .channel = y.stride(0),
                                                              .padded_rows = kPairPanel,
                                                              .out_row = 1,
                                                              .out_pair = kPairPanel});
                       }
                     });
  });
  return out;
}

void multiply_bf16(const Tensor& x, const Tensor& panels, Tensor& out, bool add) {
  const int64_t n = x.size(0), k = x.size(1), m = out.size(1), padded = panels.size(1);
  if (k == 0) {
    if (!add) out.zero_();
    return;
  }
  const at::BFloat16* y = panels.const_data_ptr<at::BFloat16>();
  float* c = out.mutable_data_ptr<float>();
  // Tasks are blocks of rows; if those are too few for all threads, smaller ones, and then blocks of columns too.
  const int64_t wanted = at::get_num_threads() > 1 ? 4 * at::get_num_threads() : 1;
  int64_t rows = kTaskRows, cols = ceil_div(m, kPairPanel) * kPairPanel;
  const auto tasks = [&] { return ceil_div(n, rows) * ceil_div(m, cols); };
  while (tasks() < wanted && rows > kUnitRows) rows /= 2;
  while (tasks() < wanted && cols > kPairPanel) cols = ceil_div(cols / 2, kPairPanel) * kPairPanel;
  const int64_t across = ceil_div(m, cols);
  with_narrow(x, [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    at::parallel_for(0, tasks(), 1, [&](int64_t task, int64_t end) {
      const Tensor copy = at::empty({rows, std::min(padded, kUnitDepth)}, panels.options());
      at::BFloat16* a = copy.mutable_data_ptr<at::BFloat16>();
      for (; task < end; ++task) {
        const int64_t i = task / across * rows, j = task % across * cols, count = std::min(rows, n - i);
        for (int64_t l = 0; l < k; l += kUnitDepth) {
          const int64_t depth = std::min(kUnitDepth, padded - l);
          GSSF_VECTORIZED(pairs_of, Pairing<T>{.x = data + i * x.stride(0) + l * x.stride(1),
                                               .out = reinterpret_cast<uint32_t*>(a),
                                               .rows = count,
                                               .channels = std::min(depth, k - l),
                                               .row = x.stride(0),
                                               .channel = x.stride(1),
                                               .padded_rows = count,
                                               .out_row = depth / 2,
                                               .out_pair = 1});
          const UnitProduct product{.a = a,
                                    .panels = y + j / kPairPanel * panels.stride(0) + l * kPairPanel,
                                    .c = c + i * out.stride(0) + j,
                                    .n = count,
                                    .depth = depth,
                                    .m = std::min(cols, m - j),
                                    .panel = panels.stride(0),
                                    .c_row = out.stride(0),
                                    .add = add || l > 0};
          product.run();
        }
      }
      at::native::cpublas::brgemm_release();
    });
  });
}

}  // namespace gssf
