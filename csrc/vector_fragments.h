// The best region of every word, and the gradients that follow. See isa.h.
#include "vector_product.h"
#include "vector_maxima.h"

// Of scores [regions, columns], rows `row` apart: the maximum of each column over the regions that take part, and the
// lowest region that attains it; -inf and -1 for none. The maxima are written in whole vectors.
template <class A>
GSSF_INLINE void best_rows(const BestRows<A>& of) {
  using V = typename Register<A>::Vector;
  using I = typename Register<A>::Index;
  using Lane = typename Register<A>::Lane;
  constexpr int64_t L = Register<A>::lanes;
  constexpr int kTogether = 4;  // vectors of columns, whose maxima and places stay in registers
  const auto vectors = [&]<int K>(int64_t j, std::integral_constant<int, K>) {
    V maximum[K];
    I place[K];
    for (int v = 0; v < K; ++v) maximum[v] = V{} - std::numeric_limits<A>::infinity(), place[v] = I{} - 1;
    for (int64_t r = 0; r < of.regions; ++r) {
      if (of.mask && !of.mask[r]) continue;
#pragma GCC unroll 4
      for (int v = 0; v < K; ++v) {
        const V score = load<V>(of.s + r * of.row + j + v * L);
        const I wins = displaces(score, maximum[v]);
        maximum[v] = wins ? score : maximum[v];
        place[v] = wins ? I{} + static_cast<Lane>(r) : place[v];
      }
    }
    for (int v = 0; v < K; ++v) {
      if (of.best) store(of.best + j + v * L, maximum[v]);
      if (!of.index) continue;
      const int64_t count = std::min(L, of.columns - j - v * L);
      for (int64_t k = 0; k < count; ++k) of.index[j + v * L + k] = static_cast<int16_t>(place[v][k]);
    }
  };
  int64_t j = 0;
  for (; j + kTogether * L <= of.columns; j += kTogether * L) vectors(j, std::integral_constant<int, kTogether>());
  for (; j < of.columns; j += L) vectors(j, std::integral_constant<int, 1>());
}

// sum [regions or words, dim] += the gradients of one score: weight times a row of the other side, for every word
// that takes part. With kRegions the destinations are the words' best regions, else the words.
template <class A, bool kRegions>
GSSF_INLINE void add_fragments(const FragmentGradient<A>& of) {
  using V = typename Register<A>::Vector;
  for (int64_t t = 0; t < of.words; ++t) {
    const int64_t region = of.index[t];
    if ((of.mask && !of.mask[t]) || region < 0) continue;
    A* sum = of.sum + (kRegions ? region : t) * of.dim;
    const A* row = of.source + (kRegions ? t : region) * of.dim;
    constexpr int64_t L = Register<A>::lanes;
    int64_t k = 0;
    for (; k + 4 * L <= of.dim; k += 4 * L)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        A* at = sum + k + v * L;
        store(at, load<V>(at) + of.weight * load<V>(row + k + v * L));
      }
    for (; k < of.dim; ++k) sum[k] += of.weight * row[k];
  }
}

#define GSSF_FRAGMENT_KERNELS(A)                                                            \
  static void best_rows_of(const BestRows<A>& of) { best_rows<A>(of); }                     \
  static void add_to_regions(const FragmentGradient<A>& of) { add_fragments<A, true>(of); } \
  static void add_to_words(const FragmentGradient<A>& of) { add_fragments<A, false>(of); }
GSSF_FRAGMENT_KERNELS(float)
GSSF_FRAGMENT_KERNELS(double)
#undef GSSF_FRAGMENT_KERNELS
