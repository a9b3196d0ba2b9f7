// gssf::late_interaction and its backward on the CPU: score[n, m] = Σ_t max_r a[n, r] · b[m, t], or the mean over t.
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#define GSSF_KERNELS "vector_fragments.h"
#include "sweep.h"

namespace gssf {
namespace {

using at::Tensor;

constexpr int64_t kPictures = 16;  // the most of a tile, so that its partials are few where pictures have few regions
constexpr int64_t kTogether = 8;   // pictures or captions whose gradients are summed side by side
constexpr int64_t kIndexPanel = 1 << 21;  // best regions that a backward holds at once, where none are kept: 4 MiB

// Regions a [N, R, D] of N pictures, words b [M, T, D] of M captions, and which of them take part: all, or those of the
// masks [N, R] and [M, T].
class Fragments {
 public:
  Fragments(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_mask, const std::optional<Tensor>& b_mask)
      : n(a.size(0)), r(a.size(1)), m(b.size(0)), t(b.size(1)), dim(a.size(2)) {
    TORCH_CHECK_VALUE(a.dim() == 3 && b.dim() == 3 && dim == b.size(2) && a.scalar_type() == b.scalar_type() &&
                          at::isFloatingType(a.scalar_type()) && r <= std::numeric_limits<int16_t>::max(),
                      "gssf::late_interaction: expected a [N, R, D] with R < 32,768 and b [M, T, D] of one floating "
                      "dtype, got ",
                      a.sizes(), " and ", b.sizes());
    const auto mask_of = [](const std::optional<Tensor>& mask, int64_t rows, int64_t fragments) {
      TORCH_CHECK_VALUE(!mask || (mask->dim() == 2 && mask->size(0) == rows && mask->size(1) == fragments &&
                                  mask->scalar_type() == at::kBool),
                        "gssf::late_interaction: expected masks [N, R] and [M, T] of bool");
      return mask ? mask->contiguous() : Tensor();
    };
    a_mask_ = mask_of(a_mask, n, r), b_mask_ = mask_of(b_mask, m, t);
    const auto counts = [](const bool* mask, int64_t rows, int64_t fragments) {
      std::vector<int64_t> out(rows, fragments);
      for (int64_t i = 0; i < rows && mask; ++i)
        out[i] = std::count(mask + i * fragments, mask + (i + 1) * fragments, true);
      return out;
    };
    regions = counts(region_mask(0), n, r), words = counts(word_mask(0), m, t);
  }

  int64_t n, r, m, t, dim;
  std::vector<int64_t> regions, words;  // how many of each take part

  bool any() const { return n > 0 && r > 0 && m > 0 && t > 0; }
  // Masks from picture n and from caption m on, or null.
  const bool* region_mask(int64_t n) const {
    return a_mask_.defined() ? a_mask_.const_data_ptr<bool>() + n * r : nullptr;
  }
  const bool* word_mask(int64_t m) const {
    return b_mask_.defined() ? b_mask_.const_data_ptr<bool>() + m * t : nullptr;
  }

 private:
  Tensor a_mask_, b_mask_;
};

// The epilogue of the sweep of regions by words: row blocks hold whole pictures.
template <class A>
class BestRegions {
 public:
  using Slot = std::vector<A>;  // the maxima of each picture and column of the tile, padded to whole vectors

  // scores [N, M], at first 0. index [N, M, T] or null.
  BestRegions(const Fragments& of, A* scores, int16_t* index) : of_(of), scores_(scores), index_(index) {}

  void tile(const A* s, const Tile& at, Slot& slot) const {
    const int64_t first = at.i0 / of_.r, pictures = at.n / of_.r, width = padded(at);
    slot.resize(pictures * width);
    for (int64_t k = 0; k < pictures; ++k) {
      const BestRows<A> best{.s = s + k * of_.r * kTileMost,
                             .row = kTileMost,
                             .regions = of_.r,
                             .columns = at.m,
                             .mask = of_.region_mask(first + k),
                             .best = slot.data() + k * width,
                             .index = index_ ? index_ + (first + k) * of_.m * of_.t + at.j0 : nullptr};
      GSSF_VECTORIZED(best_rows_of, best);
    }
  }

  // Words are added up one after another, so that equal captions have equal scores wherever tiles end.
  void fold_rows(const Tile& at, const Slot& slot) const {
    const int64_t first = at.i0 / of_.r, pictures = at.n / of_.r, width = padded(at);
    const bool* mask = of_.word_mask(0);
    for (int64_t k = 0; k < pictures; ++k) {
      if (of_.regions[first + k] == 0) continue;
      const A* best = slot.data() + k * width;
      A* scores = scores_ + (first + k) * of_.m;
      for (int64_t j = at.j0, m = j / of_.t; j < at.j0 + at.m; ++m)
        for (const int64_t end = std::min((m + 1) * of_.t, at.j0 + at.m); j < end; ++j)
          if (!mask || mask[j]) scores[m] += best[j - at.j0];
    }
  }
  void fold_cols(const Tile&, const Slot&) const {}

 private:
  static int64_t padded(const Tile& at) { return ceil_div(at.m, Simd<A>::lanes) * Simd<A>::lanes; }

  const Fragments& of_;
  A* scores_;
  int16_t* index_;
};

// (scores [N, M], index [N, M, T] int16: the best region of every word, or -1; empty without `keep`).
std::tuple<Tensor, Tensor> late_interaction(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_mask,
                                            const std::optional<Tensor>& b_mask, bool mean, bool keep) {
  const Fragments of(a, b, a_mask, b_mask);
  Tensor scores = at::zeros({of.n, of.m}, score_options(a));
  const auto index_options = a.options().dtype(at::kShort);
  Tensor index = keep ? at::full({of.n, of.m, of.t}, -1, index_options) : at::empty({0}, index_options);
  if (!of.any()) return {scores, index};
  const Tensor regions = a.reshape({-1, of.dim}), words = b.reshape({-1, of.dim});
  const Blocks rows(of.n * of.r, std::min(kTileMost, kPictures * of.r), of.r),
      cols(of.m * of.t, tile_cols(of.m * of.t));
  dispatch(a, [&](auto type) {
    using A = decltype(type);
    A* out = scores.mutable_data_ptr<A>();
    BestRegions<A> epilogue(of, out, keep ? index.mutable_data_ptr<int16_t>() : nullptr);
    if constexpr (std::is_same_v<A, float>) {
      if (rounds(a)) sweep(Bf16Panels(regions, words), rows, cols, epilogue);
      else sweep(Panels<A>(regions, words), rows, cols, epilogue);
    } else {
      sweep(Panels<A>(regions, words), rows, cols, epilogue);
    }
    for (int64_t k = 0; k < of.n * of.m && mean; ++k)
      if (const int64_t count = of.words[k % of.m]; count > 0) out[k] /= static_cast<A>(count);
  });
  return {scores, index};
}

// Best regions of a range of pictures for the words of all captions, computed again where the gradient is not 0.
template <class A>
class BestAgain {
 public:
  BestAgain(const Fragments& of, const Tensor& regions, const Tensor& words, const A* grad)
      : of_(of), regions_(regions), words_(words), grad_(grad) {}

  // index [pictures, M, T], of pictures first .. first + pictures.
  void fill(int64_t first, int64_t pictures, int16_t* index) const {
    const int64_t width = ceil_div(of_.t, kPanel<A>) * kPanel<A>;
    at::parallel_for(0, of_.m, 1, [&](int64_t m, int64_t end) {
      std::vector<A> panels(width * of_.dim), s(of_.r * width);
      for (; m < end; ++m) {
        bool packed = false;
        for (int64_t k = 0; k < pictures; ++k) {
          const int64_t n = first + k;
          if (grad_[n * of_.m + m] == 0) continue;
          if (!packed) pack(m, panels.data());
          packed = true;
          const Product<A> product{.a = regions_.template const_data_ptr<A>() + n * of_.r * of_.dim,
                                   .panels = panels.data(),
                                   .c = s.data(),
                                   .n = of_.r,
                                   .k = of_.dim,
                                   .m = of_.t,
                                   .a_row = of_.dim,
                                   .a_step = 1,
                                   .panel = of_.dim * kPanel<A>,
                                   .c_row = width,
                                   .add = false};
          GSSF_VECTORIZED(product_of, product);
          const BestRows<A> best{.s = s.data(),
                                 .row = width,
                                 .regions = of_.r,
                                 .columns = of_.t,
                                 .mask = of_.region_mask(n),
                                 .best = nullptr,
                                 .index = index + (k * of_.m + m) * of_.t};
          GSSF_VECTORIZED(best_rows_of, best);
        }
      }
    });
  }

 private:
  void pack(int64_t m, A* panels) const {
    for (int64_t j = 0; j < of_.t; j += kPanel<A>) {
      const Packing<A, A> packing{.y = words_.template const_data_ptr<A>() + (m * of_.t + j) * of_.dim,
                                  .panels = panels + j * of_.dim,
                                  .k = of_.dim,
                                  .width = std::min(kPanel<A>, of_.t - j),
                                  .row = 1,
                                  .col = of_.dim,
                                  .apart = of_.dim * kPanel<A>};
      GSSF_VECTORIZED(pack_of, packing);
    }
  }

  const Fragments& of_;
  const Tensor &regions_, &words_;
  const A* grad_;
};

// (da [N, R, D], db [M, T, D]), each empty if `needs` is false. index: that of the forward, or nothing: then best
// regions are computed again, for the pictures and captions whose gradient is not 0.
std::tuple<Tensor, Tensor> late_interaction_backward(const Tensor& grad_out, const std::optional<Tensor>& index_in,
                                                     const Tensor& a, const Tensor& b,
                                                     const std::optional<Tensor>& a_mask,
                                                     const std::optional<Tensor>& b_mask, bool mean,
                                                     c10::List<bool> needs) {
  const Fragments of(a, b, a_mask, b_mask);
  TORCH_CHECK_VALUE(needs.size() == 2, "needs: expected 2 flags, got ", needs.size());
  TORCH_CHECK_VALUE(grad_out.dim() == 2 && grad_out.size(0) == of.n && grad_out.size(1) == of.m,
                    "grad: expected shape [N, M], got ", grad_out.sizes());
  TORCH_CHECK_VALUE(!index_in || (index_in->dim() == 3 && index_in->size(0) == of.n && index_in->size(1) == of.m &&
                                  index_in->size(2) == of.t && index_in->scalar_type() == at::kShort),
                    "best: expected [N, M, T] int16");
  const auto wide = score_options(a);
  Tensor da = at::zeros(needs[0] ? a.sizes() : at::IntArrayRef{0}, wide);
  Tensor db = at::zeros(needs[1] ? b.sizes() : at::IntArrayRef{0}, wide);
  const Tensor grad = grad_out.to(wide.dtype()).contiguous();
  if (of.any()) {
    const Tensor regions = a.to(wide.dtype()).contiguous(), words = b.to(wide.dtype()).contiguous();
    const Tensor kept = index_in ? index_in->contiguous() : Tensor();
    const int64_t caption_words = of.m * of.t;
    const int64_t rows = kept.defined() ? of.n : std::clamp<int64_t>(kIndexPanel / caption_words, 1, of.n);
    const Tensor panel = kept.defined() ? kept : at::empty({rows, of.m, of.t}, a.options().dtype(at::kShort));
    if (kept.defined() && kept.numel() > 0) {
      const int16_t* data = kept.const_data_ptr<int16_t>();
      TORCH_CHECK_VALUE(std::all_of(data, data + kept.numel(), [&](int16_t k) { return k >= -1 && k < of.r; }),
                        "best: expected values in -1..R-1");
    }
    dispatch(a, [&](auto type) {
      using A = decltype(type);
      const A* g = grad.const_data_ptr<A>();
      const BestAgain<A> again(of, regions, words, g);
      for (int64_t first = 0; first < of.n; first += rows) {
        const int64_t pictures = std::min(rows, of.n - first);
        if (!kept.defined()) again.fill(first, pictures, panel.mutable_data_ptr<int16_t>());
        const int16_t* index = panel.const_data_ptr<int16_t>();
        const auto add = [&](int64_t n, int64_t m, bool to_regions) {
          if (g[n * of.m + m] == 0) return;
          const int64_t region = n * of.r * of.dim, word = m * of.t * of.dim;
          const FragmentGradient<A> gradient{
              .index = index + (n - first) * caption_words + m * of.t,
              .mask = of.word_mask(m),
              .source = to_regions ? words.const_data_ptr<A>() + word : regions.const_data_ptr<A>() + region,
              .sum = to_regions ? da.mutable_data_ptr<A>() + region : db.mutable_data_ptr<A>() + word,
              .weight = g[n * of.m + m] / static_cast<A>(mean ? std::max<int64_t>(of.words[m], 1) : 1),
              .words = of.t,
              .dim = of.dim};
          if (to_regions) GSSF_VECTORIZED(add_to_regions, gradient);
          else GSSF_VECTORIZED(add_to_words, gradient);
        };
        // Each of the other side's fragments is read once for a few pictures, or captions, whose sums stay in the
        // cache.
        const auto in_groups = [](int64_t begin, int64_t end, const auto& each) {
          at::parallel_for(0, ceil_div(end - begin, kTogether), 1, [&](int64_t group, int64_t last) {
            for (; group < last; ++group)
              each(begin + group * kTogether, std::min(begin + (group + 1) * kTogether, end));
          });
        };
        if (needs[0])
          in_groups(first, first + pictures, [&](int64_t from, int64_t to) {
            for (int64_t m = 0; m < of.m; ++m)
              for (int64_t n = from; n < to; ++n) add(n, m, true);
          });
        if (needs[1])
          in_groups(0, of.m, [&](int64_t from, int64_t to) {
            for (int64_t n = first; n < first + pictures; ++n)
              for (int64_t m = from; m < to; ++m) add(n, m, false);
          });
      }
    });
  }
  return {da.to(a.scalar_type()), db.to(b.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(gssf, CPU, library) {
  library.impl("late_interaction", late_interaction);
  library.impl("late_interaction_backward", late_interaction_backward);
}

}  // namespace gssf
