// Types shared by all instruction sets: vectors and the structs that vector kernels take.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace gssf {

// The dtype of scores and sums for inputs of type T.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 64-byte vectors of GCC and Clang: one AVX-512 register, two of AVX2, four of SSE2 or NEON.
template <class A>
struct Simd;

template <>
struct Simd<float> {
  using Vector = float __attribute__((vector_size(64)));
  using Index = int32_t __attribute__((vector_size(64)));  // as wide as a comparison's result
  using Lane = int32_t;
  static constexpr int64_t lanes = 16;
};

template <>
struct Simd<double> {
  using Vector = double __attribute__((vector_size(64)));
  using Index = int64_t __attribute__((vector_size(64)));
  using Lane = int64_t;
  static constexpr int64_t lanes = 8;
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Blocks of a sweep begin at multiples of this: whole panels of every kind of product.
constexpr int64_t kBlockStep = 64;

// One dimension divided into blocks of nearly equal size, which is a multiple of `step` but for the last.
struct Blocks {
  int64_t total, size, count;
  Blocks(int64_t total, int64_t max_size, int64_t step = kBlockStep) : total(total) {
    size = ceil_div(ceil_div(total, std::max<int64_t>(ceil_div(total, max_size), 1)), step) * step;
    count = size > 0 ? ceil_div(total, size) : 0;
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, total - block * size); }
};

// The one table of CPU tile sizes. 512 x 512 fp32 scores fill 1 MiB of a 2 MiB L2; for small problems tiles are
// narrower (tall tiles suit the product better), so that there are enough for all threads. Tile sizes depend on the
// problem alone, never on the thread count, which therefore cannot change a bit of the result.
constexpr int64_t kTileMost = 512;  // the most rows, and columns; also the stride of a tile's rows
inline int64_t tile_cols(int64_t total) { return std::clamp<int64_t>(total / 4, 64, kTileMost); }

// A product's right operand is packed in panels of kPanel columns: panel p holds its columns from p * kPanel on as [k,
// kPanel], zeros behind the last. kChain channels are summed in a chain of fused multiply-adds and the chains then
// added up, in order: a product's bits depend on its two vectors alone, and its error grows with the number of chains
// rather than of channels. kDepth channels of a panel stay in the L1 cache together.
template <class A>
constexpr int64_t kPanel = 2 * Simd<A>::lanes;
constexpr int64_t kChain = 16, kDepth = 256;

// c [n, m] = a [n, k] b, or += it. Element (i, l) of a lies at i * a_row + l * a_step; panels are `panel` apart.
template <class A>
struct Product {
  const A *a, *panels;
  A* c;
  int64_t n, k, m, a_row, a_step, panel, c_row;
  bool add;
};

// `width` adjacent columns of a right operand [k, width], and the panels they become, which are `apart` numbers apart.
template <class T, class A>
struct Packing {
  const T* y;
  A* panels;
  int64_t k, width, row, col, apart;  // element (l, j) of y lies at l * row + j * col
};

// Operands of the bf16 unit hold channels in pairs, two bf16 in 32 bits, padded with zeros to whole matrix instructions
// of kPairStep channels: a right one in panels of kPairPanel columns.
constexpr int64_t kPairPanel = 64, kPairStep = 32;

// x [rows, channels] rounded to pairs: a left operand, or the transpose of a right one. Element (i, l) of x lies at i *
// row + l * channel, and its pair at i * out_row + l / 2 * out_pair of out; one of these two strides is 1. Zeros are
// written behind the last row, up to padded_rows, and behind the last channel; up to 15 further rows may be written.
template <class T>
struct Pairing {
  const T* x;
  uint32_t* out;
  int64_t rows, channels, row, channel, padded_rows, out_row, out_pair;
};

// One entry per row, or per column, of a tile: the type of a tile's partials, uninitialised until a vector kernel fills
// them.
template <class T>
struct alignas(64) PerAnchor : std::array<T, kTileMost> {};

// Maxima of one tile's rows, or of its columns, with their places inside the tile.
template <class A>
struct Maxima {
  PerAnchor<A> score;
  PerAnchor<typename Simd<A>::Lane> index;
};

template <class A>
struct TileMaxima {
  Maxima<A> rows, cols;
};

// The largest score of a negative that counts for each row of a tile, and for each column; null: all count. Those of
// columns are followed by numbers up to a whole vector.
template <class A>
struct Limits {
  const A *rows = nullptr, *cols = nullptr;
};

// Terms of the relative negatives of one tile's rows, or of its columns: over the scores that count, except the maximum
// itself. `ties`: how many of them equal the maximum; only the mean of distances needs it.
template <class A>
struct Terms {
  PerAnchor<A> sum;
  PerAnchor<typename Simd<A>::Lane> count, ties;
};

template <class A>
struct TileTerms {
  Terms<A> rows, cols;
};

// Scores [regions, columns] of the regions of one picture, rows `row` apart, in whole vectors; mask [regions]: which
// take part, null for all. best, index [columns]: what is wanted, or null.
template <class A>
struct BestRows {
  const A* s;
  int64_t row, regions, columns;
  const bool* mask;
  A* best;
  int16_t* index;
};

// The gradient of one picture and caption, divided by the number of words in a mean; index [words]: each word's best
// region, or -1; mask [words]: which take part, null for all. source [regions or words, channels] is the other side;
// rows of it and of sum are `row` apart.
template <class A>
struct FragmentGradient {
  const int16_t* index;
  const bool* mask;
  const A* source;
  A* sum;
  A weight;
  int64_t words, dim;
};

// Edges grouped by destination, in their original order within a group: edge[first[d]:first[d + 1]].
struct Groups {
  std::vector<int64_t> first, edge;
  // Edges with -1 at either end are in no group. Defined in edges.h.
  Groups(const int64_t* destination, const int64_t* source, int64_t edges, int64_t destinations);
};

// grad_out of a projection's rows: dense, or gathered from the gradients of listed pairs.
template <class T, class A>
struct Upstream {
  const T* dense = nullptr;  // [N, D]; null: row d is the sum over edges e of d of dscores[e] * other[source[e]]
  const T* other = nullptr;
  const int64_t* source = nullptr;
  const A* dscores = nullptr;
  const Groups* groups = nullptr;
};

constexpr int64_t kChunkRows = 64;  // rows of x that a thread projects at a time
constexpr double kEps = 1e-12;      // the smallest divisor, as in torch.nn.functional.normalize

// The metric's weights in A; blocks (the forward's) or their transposes (the backward's)
// padded so that a whole vector may be read anywhere.
template <class A>
struct Weights {
  int64_t dim = 0, groups = 0, width = 0, ld = 0;
  bool normalize = false;
  std::vector<A> diag, blocks, transposed;
  std::vector<int64_t> permutation;
};

// Scratch for kChunkRows rows, in A; the stride of rows exceeds dim a little, to avoid cache aliasing.
template <class A>
struct Chunk {
  int64_t ld;
  std::vector<A> rows;
  Chunk(int64_t dim, bool used) : ld((dim / 16 + 2) * 16), rows(used ? kChunkRows * ld : 0) {}
  A* row(int64_t r) { return rows.data() + r * ld; }
};

template <class A>
struct Scratch {
  Chunk<A> x, g, out, x_grouped, g_grouped, out_grouped;
  std::vector<A> norm;
  Scratch(const Weights<A>& weights, bool backward) : Scratch(weights.dim, backward, !weights.permutation.empty()) {}

 private:
  Scratch(int64_t dim, bool backward, bool permuted)
      : x(dim, true),
        g(dim, backward),
        out(dim, true),
        x_grouped(dim, permuted),
        g_grouped(dim, permuted && backward),
        out_grouped(dim, permuted),
        norm(kChunkRows) {}
};

}  // namespace gssf
