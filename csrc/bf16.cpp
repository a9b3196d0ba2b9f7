// Products on the processor's unit for bf16 numbers.
#include "bf16.h"

#include <ATen/Context.h>

namespace gssf {
namespace {

using at::Tensor;

// Rows and channels that one call of the unit takes at most: a fixed table, because threads share the work in multiples
// of them and so change no sum. A block of x and a part of a panel lie in the L2 cache together.
constexpr int64_t kUnitRows = 64, kUnitDepth = 512;

// What one task copies of x at once.
constexpr int64_t kTaskRows = 256;

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
                                                              .lines = std::min(kPairPanel, m - j),
                                                              .channels = k,
                                                              .line = y.stride(1),
                                                              .channel = y.stride(0),
                                                              .padded_lines = kPairPanel,
                                                              .out_line = 1,
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
  // Blocks of rows; where there are fewer than threads could take, smaller ones, and then blocks of columns too.
  const int64_t wanted = at::get_num_threads() > 1 ? 4 * at::get_num_threads() : 1;
  int64_t rows = kTaskRows, cols = ceil_div(m, kPairPanel) * kPairPanel;
  const auto tasks = [&] { return ceil_div(n, rows) * ceil_div(m, cols); };
  while (tasks() < wanted && rows > kUnitRows) rows /= 2;
  while (tasks() < wanted && cols > kPairPanel) cols = ceil_div(cols / 2, kPairPanel) * kPairPanel;
  const int64_t across = ceil_div(m, cols);
  with_narrow(x, [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    at::parallel_for(0, tasks(), 1, [&](int64_t task, int64_t end) {
      const int64_t deepest = std::min(padded, kUnitDepth);
      const Tensor copy = at::empty({rows, deepest}, panels.options());
      at::BFloat16* a = copy.mutable_data_ptr<at::BFloat16>();
      alignas(64) float edge[kUnitRows * kPairPanel];  // of columns behind the last
      for (; task < end; ++task) {
        const int64_t i0 = task / across * rows, j0 = task % across * cols;
        const int64_t count = std::min(rows, n - i0), j1 = std::min(j0 + cols, m);
        for (int64_t l = 0; l < k; l += kUnitDepth) {
          const int64_t depth = std::min(kUnitDepth, padded - l);
          GSSF_VECTORIZED(pairs_of, Pairing<T>{.x = data + i0 * x.stride(0) + l * x.stride(1),
                                               .out = reinterpret_cast<uint32_t*>(a),
                                               .lines = count,
                                               .channels = std::min(depth, k - l),
                                               .line = x.stride(0),
                                               .channel = x.stride(1),
                                               .padded_lines = count,
                                               .out_line = depth / 2,
                                               .out_pair = 1});
          const bool more = add || l > 0;
          for (int64_t j = j0; j < j1; j += kPairPanel) {
            const at::BFloat16* panel = y + j / kPairPanel * panels.stride(0) + l * kPairPanel;
            const int64_t width = std::min(kPairPanel, j1 - j);
            for (int64_t i = 0; i < count; i += kUnitRows) {
              const int64_t height = std::min(kUnitRows, count - i);
              float* to = c + (i0 + i) * out.stride(0) + j;
              const bool whole = width == kPairPanel;
              at::native::cpublas::brgemm(height, kPairPanel, depth, depth, kPairPanel,
                                          whole ? out.stride(0) : kPairPanel, whole && more, a + i * depth, panel,
                                          whole ? to : edge);
              for (int64_t r = 0; r < height && !whole; ++r)
                for (int64_t at = 0; at < width; ++at) {
                  const float sum = edge[r * kPairPanel + at];
                  to[r * out.stride(0) + at] = more ? to[r * out.stride(0) + at] + sum : sum;
                }
            }
          }
        }
      }
      at::native::cpublas::brgemm_release();
    });
  });
}

}  // namespace gssf
