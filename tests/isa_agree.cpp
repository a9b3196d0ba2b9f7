// Runs the vector kernels of every instruction set this processor has on the same inputs and compares
// them with the plain build: maxima and counts to the bit (they only compare), sums to rounding, and the exponential
// with the C library's. Prints one line per set and exits 1 on the first difference. Built and run by
// tests/test_isa.py.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define GSSF_KERNELS "all_kernels.h"
#include "dense.h"
#include "isa.h"

using namespace gssf;

static std::mt19937 generator(7);

template <class A>
static std::vector<A> normal(size_t count) {
  std::normal_distribution<double> draw;
  std::vector<A> out(count);
  for (auto& v : out) v = static_cast<A>(draw(generator));
  return out;
}

static void check(bool ok, const char* what) {
  if (ok) return;
  std::printf("differs from the plain build: %s\n", what);
  std::exit(1);
}

template <class A>
static void check_close(const std::vector<A>& got, const std::vector<A>& expected, const char* what) {
  double scale = 0, distance = 0;
  for (size_t k = 0; k < got.size(); ++k) {
    scale += double(expected[k]) * double(expected[k]);
    distance += (double(got[k]) - double(expected[k])) * (double(got[k]) - double(expected[k]));
  }
  check(std::sqrt(distance / scale) < (sizeof(A) == 8 ? 1e-14 : 1e-6), what);
}

template <class A, class Plain, class Level>
static void maxima(Plain plain, Level level) {
  using Lane = typename Simd<A>::Lane;
  for (const int64_t m : {1, 15, 16, 17, 130, 512})
    for (const bool ids : {false, true}) {
      const int64_t n = 37;
      std::vector<A> s(n * kTileMost, -std::numeric_limits<A>::infinity());
      std::uniform_int_distribution<int> few(-3, 3), kind(0, 400);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) {
          const int k = kind(generator);
          s[i * kTileMost + j] = k == 0   ? std::numeric_limits<A>::quiet_NaN()
                                 : k == 1 ? std::numeric_limits<A>::infinity()
                                          : A(few(generator));
        }
      std::vector<Lane> row_id(n), col_id(m + 64, -1);
      for (auto& id : row_id) id = few(generator);
      for (int64_t j = 0; j < m; ++j) col_id[j] = few(generator);
      TileMaxima<A> x, y;
      auto t = s;
      plain(s.data(), n, m, ids ? row_id.data() : nullptr, ids ? col_id.data() : nullptr, x);
      level(t.data(), n, m, ids ? row_id.data() : nullptr, ids ? col_id.data() : nullptr, y);
      check(!std::memcmp(s.data(), t.data(), s.size() * sizeof(A)), "masked scores");
      for (int64_t i = 0; i < n; ++i) check(x.rows.index[i] == y.rows.index[i], "row index");
      for (int64_t j = 0; j < m; ++j) check(x.cols.index[j] == y.cols.index[j], "column index");
      check(!std::memcmp(x.rows.score.data(), y.rows.score.data(), n * sizeof(A)), "row score");
      check(!std::memcmp(x.cols.score.data(), y.cols.score.data(), m * sizeof(A)), "column score");
    }
}

template <class A, class Plain, class Level>
static void terms(Plain plain, Level level) {
  const int64_t n = 37, m = 130;
  const A inf = std::numeric_limits<A>::infinity(), beta = 3;
  std::vector<A> s(n * kTileMost, -inf);
  std::uniform_int_distribution<int> few(-3, 3);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) s[i * kTileMost + j] = A(few(generator)) / 7;
  TileMaxima<A> best;
  plain::tile_maxima_of(s.data(), n, m, nullptr, nullptr, best);
  for (const A* exponent : {static_cast<const A*>(nullptr), &beta}) {
    TileTerms<A> x, y;
    plain(s.data(), n, m, best, A(-0.2), exponent, x);
    level(s.data(), n, m, best, A(-0.2), exponent, y);
    const auto same = [](const Terms<A>& p, const Terms<A>& q, int64_t count) {
      check(!std::memcmp(p.count.data(), q.count.data(), count * sizeof(p.count[0])), "count of terms");
      check(!std::memcmp(p.ties.data(), q.ties.data(), count * sizeof(p.ties[0])), "ties among terms");
      check_close(std::vector<A>(q.sum.data(), q.sum.data() + count),
                  std::vector<A>(p.sum.data(), p.sum.data() + count), "sum of terms");
    };
    same(x.rows, y.rows, n);
    same(x.cols, y.cols, m);
  }
}

// Rows of two scores, 0 and x, have the one term e^x.
template <class A, class Level>
static void exponential(Level level) {
  using Limits = std::numeric_limits<A>;
  const A least = std::log(Limits::min()), one = 1;
  std::vector<A> s(kTileMost * kTileMost, -Limits::infinity());
  std::vector<double> x(kTileMost);
  TileMaxima<A> best;
  TileTerms<A> out;
  for (const double scale : {1e-9, 1e-3, 1.0, 10.0, double(-least)}) {
    for (int64_t i = 0; i < kTileMost; ++i) {
      s[i * kTileMost] = 0;
      x[i] = s[i * kTileMost + 1] = static_cast<A>(-scale * 0.9999 * (i + 1) / kTileMost);
    }
    plain::tile_maxima_of(s.data(), kTileMost, 2, nullptr, nullptr, best);
    level(s.data(), kTileMost, 2, best, Limits::lowest(), &one, out);
    for (int64_t i = 0; i < kTileMost; ++i)
      check(std::abs(out.rows.sum[i] / std::exp(x[i]) - 1) < 1.5 * Limits::epsilon(), "exponential");
  }
  const A far[] = {A(2) * least, A(-1e30), Limits::lowest()};
  for (int64_t i = 0; i < 3; ++i) s[i * kTileMost + 1] = far[i];
  level(s.data(), 3, 2, best, Limits::lowest(), &one, out);
  for (int64_t i = 0; i < 3; ++i) check(out.rows.sum[i] == 0, "exponential of what is far below");
}

template <class A, class Forward, class Backward>
static std::vector<A> projected(Forward forward, Backward backward, int64_t width, bool permuted) {
  generator.seed(3);
  const int64_t dim = width * 3, rows = 13;
  Weights<A> weights;
  weights.dim = dim, weights.groups = 3, weights.width = width, weights.normalize = true;
  weights.ld = (width / Simd<A>::lanes + 2) * Simd<A>::lanes;
  weights.diag = normal<A>(dim);
  weights.blocks = normal<A>(dim * weights.ld), weights.transposed = normal<A>(dim * weights.ld);
  for (int64_t c = 0; permuted && c < dim; ++c) weights.permutation.push_back((c * 5 + 1) % dim);
  const auto x = normal<A>(rows * dim), grad = normal<A>(rows * dim);
  std::vector<A> out(2 * rows * dim + dim + dim * width, A(0));
  Scratch<A> scratch(weights, true);
  forward(x.data(), weights, scratch, out.data(), rows);
  A* rest = out.data() + rows * dim;
  Upstream<A, A> upstream;
  upstream.dense = grad.data();
  backward(upstream, x.data(), weights, scratch, rest, rest + rows * dim, rest + rows * dim + dim, 0, rows);
  return out;
}

template <class A, class Scores, class Gather>
static std::vector<A> paired(Scores scores, Gather gather) {
  generator.seed(4);
  const int64_t n = 9, dim = 83, edges = 40;
  const auto a = normal<A>(n * dim), b = normal<A>(n * dim), grad = normal<A>(edges);
  std::vector<int64_t> rows(edges), cols(edges);
  for (auto& i : rows) i = generator() % n;
  for (auto& j : cols) j = generator() % n;
  Groups groups(rows.data(), cols.data(), 0, n);
  for (int64_t d = 0; d < n; ++d) {
    for (int64_t e = 0; e < edges; ++e)
      if (rows[e] == d) groups.edge.push_back(e);
    groups.first[d + 1] = groups.edge.size();
  }
  std::vector<A> out(edges + n * dim);
  scores(a.data(), b.data(), rows.data(), cols.data(), out.data(), dim, 0, edges);
  gather(b.data(), cols.data(), grad.data(), groups, out.data() + edges, dim, 0, n);
  return out;
}

// Products of every remainder of rows, columns and channels, of rows and columns of a, onto a frame that stays as it
// is.
template <class A, class Pack, class Multiply>
static std::vector<A> products(Pack pack, Multiply multiply) {
  generator.seed(5);
  std::vector<A> out;
  for (const int64_t n : {1, 2, 3, 5, 13})
    for (const int64_t m : {int64_t(1), kPanel<A> / 2, kPanel<A>, 2 * kPanel<A> + 3})
      for (const int64_t k : {int64_t(1), kChain + 1, kDepth + 9})
        for (const bool columns : {false, true})
          for (const bool add : {false, true}) {
            const auto a = normal<A>(n * k), b = normal<A>(m * k);
            std::vector<A> panels(ceil_div(m, kPanel<A>) * k * kPanel<A>), c = normal<A>((n + 1) * (m + 2));
            for (int64_t j = 0; j < m; j += kPanel<A>)
              pack(Packing<A, A>{b.data() + j * k, panels.data() + j * k, k, std::min(kPanel<A>, m - j), 1, k});
            const auto frame = c;
            multiply(Product<A>{a.data(), panels.data(), c.data(), n, k, m, columns ? 1 : k, columns ? n : 1,
                                k * kPanel<A>, m + 2, add});
            for (int64_t at = 0; at < int64_t(c.size()); ++at)
              if (at / (m + 2) == n || at % (m + 2) >= m) check(c[at] == frame[at], "what lies beside a product");
            out.insert(out.end(), c.begin(), c.end());
          }
  return out;
}

// Operands of the bf16 unit, of every remainder of lines and channels, from rows, columns and neither, into rows and
// panels.
template <class T, class Round>
static std::vector<uint32_t> pairs(Round round) {
  generator.seed(7);
  std::vector<uint32_t> out;
  for (const int64_t lines : {1, 16, 45})
    for (const int64_t channels : {1, 32, 71})
      for (const auto& [line, channel] : {std::pair{channels, int64_t(1)}, {int64_t(1), lines}, {2 * channels, 2l}})
        for (const bool panel : {false, true}) {
          const int64_t padded = ceil_div(channels, kPairStep) * kPairStep / 2;
          const auto x = normal<float>(2 * lines * channels);
          const std::vector<T> narrow(x.begin(), x.end());
          std::vector<uint32_t> to(64 * padded, 7);
          round(Pairing<T>{narrow.data(), to.data(), lines, channels, line, channel, panel ? 64 : lines,
                           panel ? 1 : padded, panel ? 64 : 1});
          for (int64_t i = 0; i < lines; ++i)
            for (int64_t l = 0; l < 2 * padded; ++l) {
              const uint32_t both = to[panel ? l / 2 * 64 + i : i * padded + l / 2];
              const T value = l < channels ? narrow[i * line + l * channel] : T(0);
              const c10::BFloat16 rounded(static_cast<float>(value));
              check((l % 2 ? both >> 16 : both & 0xffff) == rounded.x, "rounding to pairs");
            }
          out.insert(out.end(), to.begin(), to.end());
        }
  return out;
}

// The passes over a ragged tile of scores: everything that they leave.
template <class A, class LogSum, class Soft, class Sum, class Relation>
static std::vector<A> passes(LogSum log_sum, Soft soft, Sum sum, Relation relation) {
  generator.seed(6);
  const int64_t n = 21, m = 150, ld = 160, cols = 77;
  const auto s = normal<A>(n * ld), u = normal<A>(n * ld), w = normal<A>(n * ld), row = normal<A>(n),
             col = normal<A>(m);
  std::vector<int64_t> row_id(n), col_id(m);
  for (auto& id : row_id) id = generator() % 5;
  for (auto& id : col_id) id = generator() % 5;
  std::vector<A> out;
  const auto keep = [&](const A* p, int64_t count) { out.insert(out.end(), p, p + count); };
  LogSums<A> logs;
  log_sum(s.data(), ld, n, m, A(3), logs);
  keep(logs.row_max, n), keep(logs.row_sum, n), keep(logs.col_max, m), keep(logs.col_sum, m);
  std::vector<A> log_row(n), log_col(m), along(n);
  for (int64_t i = 0; i < n; ++i) log_row[i] = std::log(logs.row_sum[i]);
  for (int64_t j = 0; j < m; ++j) log_col[j] = std::log(logs.col_sum[j]);
  auto t = s;
  soft(t.data(), ld, n, m, A(3), Softmax<A>{logs.row_max, log_row.data(), row.data()},
       Softmax<A>{logs.col_max, log_col.data(), col.data()}, along.data());
  keep(t.data(), t.size()), keep(along.data(), n);
  for (const Kind kind : {Kind::hinge, Kind::softplus, Kind::abs, Kind::square})
    for (const Positives positives : {Positives::include, Positives::exclude, Positives::negate}) {
      t = s;
      Sums<A> sums;
      sum(kind,
          SumTile<A>{t.data(),
                     ld,
                     n,
                     m,
                     cols,
                     -3,
                     A(2),
                     {row.data(), row.data(), row_id.data()},
                     {col.data(), col.data(), col_id.data()},
                     positives,
                     true},
          sums);
      keep(t.data(), t.size()), keep(sums.row_sum, n), keep(sums.row_slope, n), keep(sums.along, n);
      keep(sums.col_sum, cols), keep(sums.col_slope, cols);
    }
  for (const Kind kind : {Kind::abs, Kind::square}) {
    t = s;
    RelationSums<A> sums;
    relation(RelationTile<A>{t.data(), u.data(), w.data(), ld, n, m, 40, 2, A(0.3), kind, true}, sums);
    keep(t.data(), t.size()), keep(sums.student, n), keep(sums.teachers, n), keep(sums.along, n);
  }
  return out;
}

// Normally part of pairs.cpp; here only the layout is needed.
Groups::Groups(const int64_t*, const int64_t*, int64_t edges, int64_t destinations)
    : first(destinations + 1, 0), edge(edges) {}

#define CALL(level, f) [](auto&&... v) { level::f(v...); }
#define COMPARE(level, A)                                                                                         \
  maxima<A>(CALL(plain, tile_maxima_of), CALL(level, tile_maxima_of));                                            \
  terms<A>(CALL(plain, tile_terms_of), CALL(level, tile_terms_of));                                               \
  exponential<A>(CALL(level, tile_terms_of));                                                                     \
  for (const int64_t width : {1, 7, 16, 33})                                                                      \
    for (const bool permuted : {false, true})                                                                     \
      check_close(projected<A>(CALL(level, project_run), CALL(level, backward_run), width, permuted),             \
                  projected<A>(CALL(plain, project_run), CALL(plain, backward_run), width, permuted), "project"); \
  check_close(paired<A>(CALL(level, pair_scores_run), CALL(level, gather_run)),                                   \
              paired<A>(CALL(plain, pair_scores_run), CALL(plain, gather_run)), "pairs");                         \
  check_close(products<A>(CALL(level, pack_of), CALL(level, product_of)),                                         \
              products<A>(CALL(plain, pack_of), CALL(plain, product_of)), "products");                            \
  check_close(passes<A>(CALL(level, logsumexp_tile_of), CALL(level, softmax_tile_of), CALL(level, sum_tile_of),   \
                        CALL(level, relation_tile_of)),                                                           \
              passes<A>(CALL(plain, logsumexp_tile_of), CALL(plain, softmax_tile_of), CALL(plain, sum_tile_of),   \
                        CALL(plain, relation_tile_of)),                                                           \
              "passes over scores");

#define COMPARE_PAIRS(level)                                                                            \
  check(pairs<float>(CALL(level, pairs_of)) == pairs<float>(CALL(plain, pairs_of)) &&                   \
            pairs<c10::Half>(CALL(level, pairs_of)) == pairs<c10::Half>(CALL(plain, pairs_of)) &&       \
            pairs<c10::BFloat16>(CALL(level, pairs_of)) == pairs<c10::BFloat16>(CALL(plain, pairs_of)), \
        "pairs of bf16, to the bit")

int main() {
  exponential<float>(CALL(plain, tile_terms_of));
  exponential<double>(CALL(plain, tile_terms_of));
#ifdef GSSF_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v3")) {
    COMPARE_PAIRS(v3);
    COMPARE(v3, float) COMPARE(v3, double) std::printf("x86-64-v3 agrees\n");
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    check(products<float>(CALL(v4, pack_of), CALL(v4, product_of)) ==
              products<float>(CALL(v3, pack_of), CALL(v3, product_of)),
          "products of both sets of fused multiply-adds, to the bit");
    COMPARE_PAIRS(v4);
    COMPARE(v4, float) COMPARE(v4, double) std::printf("x86-64-v4 agrees\n");
  }
#endif
  std::printf("plain ran\n");
}
