// gssf::pack, and gssf::multiply, out = x y, with y packed before or here: see gssf_kernels/dense.py.
#include "bf16.h"

#include <torch/library.h>

#include <memory>
#include <vector>

namespace gssf {
namespace {

using at::Tensor;

// The most rows and columns of c per task: its rows of a and panels of b fit in the L2 cache together.
constexpr int64_t kTaskRows = 256, kTaskCols = 256;
constexpr int64_t kRowStep = 12;  // a task's rows are whole register tiles, of 4 or 6 rows

Tensor pack(const Tensor& y, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(y.dim() == 2 && at::isFloatingType(y.scalar_type()), "pack: expected a matrix, got ", y.sizes());
  if (dtype == at::kBFloat16) {
    TORCH_CHECK_VALUE(bf16_unit() != Bf16Unit::none, "pack: this processor has no bf16 unit");
    return packed_bf16(y);
  }
  return dtype == at::kDouble ? packed<double>(y) : packed<float>(y);
}

// multiply_once() for a y of T and results of A.
template <class A, class T>
void multiply_packing(const Tensor& x, const Tensor& y, Tensor& out, bool add) {
  constexpr int64_t P = kPanel<A>;
  const int64_t n = x.size(0), k = x.size(1), m = out.size(1);
  const A* a = x.const_data_ptr<A>();
  const T* b = y.const_data_ptr<T>();
  A* c = out.mutable_data_ptr<A>();
  // Tasks as wide as they can be, because each reads all of x. Threads take rounds of one task each; in all rounds
  // together at most one place in eight of those tasks may stay empty.
  const int64_t threads = at::get_num_threads();
  int64_t cols = kTaskCols;
  const auto empty = [&](int64_t tasks) { return ceil_div(tasks, threads) * threads - tasks; };
  while (8 * empty(ceil_div(m, cols)) > ceil_div(m, cols) && cols > P) cols /= 2;
  at::parallel_for(0, ceil_div(m, cols), 1, [&](int64_t task, int64_t end) {
    const auto panels = std::make_unique_for_overwrite<A[]>(cols * std::min(k, kDepth));
    for (; task < end; ++task) {
      const int64_t first = task * cols, width = std::min(cols, m - first);
      for (int64_t l = 0; l < k || l == 0; l += kDepth) {
        const int64_t depth = std::min(kDepth, k - l);
        const int64_t step = y.stride(1) == 1 ? width : P;  // columns that are packed together
        for (int64_t j = 0; j < width; j += step) {
          const Packing<T, A> packing{.y = b + l * y.stride(0) + (first + j) * y.stride(1),
                                      .panels = panels.get() + j * depth,
                                      .k = depth,
                                      .width = std::min(step, width - j),
                                      .row = y.stride(0),
                                      .col = y.stride(1),
                                      .apart = depth * P};
          GSSF_VECTORIZED(pack_of, packing);
        }
        for (int64_t i = 0; i < n; i += kTaskRows) {
          const Product<A> product{.a = a + i * x.stride(0) + l,
                                   .panels = panels.get(),
                                   .c = c + i * out.stride(0) + first,
                                   .n = std::min(kTaskRows, n - i),
                                   .k = depth,
                                   .m = width,
                                   .a_row = x.stride(0),
                                   .a_step = 1,
                                   .panel = depth * P,
                                   .c_row = out.stride(0),
                                   .add = add || l > 0};
          GSSF_VECTORIZED(product_of, product);
        }
      }
    }
  });
}

// out [n, m] = x [n, k] y or += it, as multiply() of pack(y), to the bit, for a y that is multiplied but once: a task
// packs the columns that it multiplies, kDepth channels at a time, which are then still in its cache.
void multiply_once(const Tensor& x_in, const Tensor& y, Tensor& out, bool add) {
  TORCH_CHECK_VALUE(x_in.dim() == 2 && y.dim() == 2 && out.dim() == 2 && x_in.size(1) == y.size(0) &&
                        out.size(0) == x_in.size(0) && out.size(1) == y.size(1) && out.stride(1) == 1 &&
                        x_in.scalar_type() == out.scalar_type(),
                    "multiply: expected x [n, k], y [k, m] and out [n, m] of x's dtype, got ", x_in.sizes(), ", ",
                    y.sizes(), " and ", out.sizes());
  const Tensor x = x_in.stride(1) == 1 ? x_in : x_in.contiguous();
  if (out.scalar_type() == at::kDouble) return multiply_packing<double, double>(x, y, out, add);
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat, "multiply: expected fp32 or fp64");
  if (y.scalar_type() == at::kFloat) multiply_packing<float, float>(x, y, out, add);
  else if (y.scalar_type() == at::kHalf) multiply_packing<float, c10::Half>(x, y, out, add);
  else multiply_packing<float, c10::BFloat16>(x, y, out, add);
}

// out [n, m] = x [n, k] y or += it, y packed by pack(), or y itself: see multiply_once(). x and out have the dtype of
// the panels; with panels of bf16, out is fp32, and x is rounded to bf16.
void multiply(const Tensor& x, const Tensor& panels, Tensor& out, bool add) {
  if (panels.dim() == 2) return multiply_once(x, panels, out, add);
  const int64_t n = x.size(0), k = x.size(1), m = out.size(1);
  if (panels.scalar_type() == at::kBFloat16) {
    TORCH_CHECK_VALUE(panels.dim() == 3 && panels.size(0) == ceil_div(m, kPairPanel) &&
                          panels.size(1) == ceil_div(k, kPairStep) * kPairStep && panels.size(2) == kPairPanel &&
                          panels.stride(1) == kPairPanel && panels.stride(2) == 1 && out.size(0) == n &&
                          out.stride(1) == 1,
                      "multiply: expected x [n, k], panels of y [k, m] and out [n, m], got ", x.sizes(), ", ",
                      panels.sizes(), " and ", out.sizes());
    return multiply_bf16(x, panels, out, add);
  }
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "multiply", [&] {
    using A = scalar_t;
    constexpr int64_t P = kPanel<A>;
    TORCH_CHECK_VALUE(panels.dim() == 3 && panels.size(0) == ceil_div(m, P) && panels.size(1) == k &&
                          panels.size(2) == P && panels.stride(1) == P && panels.stride(2) == 1 && out.size(0) == n &&
                          out.stride(1) == 1,
                      "multiply: expected x [n, k], panels of y [k, m] and out [n, m], got ", x.sizes(), ", ",
                      panels.sizes(), " and ", out.sizes());
    const A *a = x.const_data_ptr<A>(), *b = panels.const_data_ptr<A>();
    A* c = out.mutable_data_ptr<A>();
    // Smaller tasks if there are too few for all threads: task sizes change no bit.
    int64_t rows = kTaskRows, cols = kTaskCols;
    const auto tasks = [&] { return ceil_div(n, rows) * ceil_div(m, cols); };
    while (tasks() < 4 * at::get_num_threads() && cols > P) cols /= 2;
    while (tasks() < 4 * at::get_num_threads() && rows > 64) rows /= 2;
    const Blocks row_blocks(n, rows, kRowStep), col_blocks(m, cols, P);  // of one size: each thread gets as many
    // If channels of x are not adjacent, kDepth channels at a time are copied.
    const bool columns = x.stride(1) != 1 && n > 1;
    at::parallel_for(0, row_blocks.count * col_blocks.count, 1, [&](int64_t task, int64_t end) {
      std::vector<A> copy(columns ? row_blocks.size * kDepth : 0);
      for (; task < end; ++task) {
        const int64_t row_block = task / col_blocks.count, col_block = task % col_blocks.count;
        const int64_t i = row_blocks.begin(row_block), j = col_blocks.begin(col_block);
        const int64_t count = row_blocks.length(row_block);
        Product<A> product{.a = a + i * x.stride(0),
                           .panels = b + j / P * panels.stride(0),
                           .c = c + i * out.stride(0) + j,
                           .n = count,
                           .k = k,
                           .m = col_blocks.length(col_block),
                           .a_row = x.stride(0),
                           .a_step = x.stride(1),
                           .panel = panels.stride(0),
                           .c_row = out.stride(0),
                           .add = add};
        if (!columns || k == 0) {
          GSSF_VECTORIZED(product_of, product);
          continue;
        }
        for (int64_t l = 0; l < k; l += kDepth) {
          product.k = std::min(kDepth, k - l);
          for (int64_t at = 0; at < product.k; ++at) {
            const A* from = a + i * x.stride(0) + (l + at) * x.stride(1);
            if (x.stride(0) == 1) std::copy_n(from, count, copy.data() + at * count);
            else
              for (int64_t r = 0; r < count; ++r) copy[at * count + r] = from[r * x.stride(0)];
          }
          product.a = copy.data(), product.a_row = 1, product.a_step = count;
          GSSF_VECTORIZED(product_of, product);
          product.panels += kDepth * P, product.add = true;
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gssf, library) {
  library.def("pack(Tensor y, ScalarType dtype) -> Tensor");
  library.def("multiply(Tensor x, Tensor panels, Tensor(a!) out, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("pack", pack);
  library.impl("multiply", multiply);
}

}  // namespace gssf
