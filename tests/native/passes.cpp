// Vector kernels of the passes over a chunk of scores.
#include "dense.h"

#define GSSF_KERNELS "vector_dense.h"
#include "isa.h"

#include "instruction_sets.h"

using namespace gssf;

namespace {

#define KERNELS(set)                \
  struct set##_kernels {            \
    FORWARD(set, logsumexp_tile_of) \
    FORWARD(set, softmax_tile_of)   \
    FORWARD(set, sum_tile_of)       \
    FORWARD(set, relation_tile_of)  \
  };
FOR_EACH_SET(KERNELS)

using Optional = std::optional<py::array>;

// s [n, ld], of which m columns are a tile's.
struct Sizes {
  int64_t n, ld, m;
  Sizes(const py::array& s, int64_t m) : n(s.shape(0)), ld(s.shape(1)), m(m) {
    expect(s.ndim() == 2 && n <= kPassRows && m <= kPassCols && m <= ld,
           "s: expected up to kPassRows rows, and m of up to kPassCols of their columns");
  }
  int64_t count() const { return n * ld; }
};

Kind kind_of(const std::string& name) {
  for (const auto& [kind, its_name] :
       {std::pair(Kind::hinge, "hinge"), {Kind::softplus, "softplus"}, {Kind::abs, "abs"}, {Kind::square, "square"}})
    if (name == its_name) return kind;
  throw py::value_error("kind: " + name);
}

Positives positives_of(const std::string& name) {
  for (const auto& [positives, its_name] :
       {std::pair(Positives::include, "include"), {Positives::exclude, "exclude"}, {Positives::negate, "negate"}})
    if (name == its_name) return positives;
  throw py::value_error("positives: " + name);
}

// A direction's labels, of rows or of columns, and with mining or limits the bounds [2, count] of what counts.
template <class A>
ByLabel<A> by_label(const Optional& labels, const Optional& bounds, int64_t count) {
  const A* bound = read<A>("bounds", bounds, 2 * count);
  return {labels ? read<typename Simd<A>::Lane>("labels", *labels, count + Simd<A>::lanes) : nullptr, bound,
          bound ? bound + count : nullptr};
}

// The arguments by which scores become logits; labels end with a vector's worth of others.
struct Logits {
  int64_t m;
  std::string score;
  std::vector<double> constants;
  int64_t offset;
  bool leave_out, columns;
  Optional row_labels, col_labels, row_bounds, col_bounds;

  // f(ScoreTag, tile)
  template <class A, class F>
  void with_tile(A* s, const Sizes& sizes, F f) const {
    LogitTile<A> tile{s, sizes.ld, sizes.n, m, offset, leave_out, columns, {}, {}, {}};
    expect(constants.size() <= tile.constants.size(), "constants: more than three");
    std::copy(constants.begin(), constants.end(), tile.constants.begin());
    tile.rows = by_label<A>(row_labels, row_bounds, sizes.n);
    tile.cols = by_label<A>(col_labels, col_bounds, m);
#define NAMED(name) \
  if (score == #name) return f(ScoreTag<Score::name>(), tile);
    GSSF_SCORES(NAMED)
#undef NAMED
    throw py::value_error("score: " + score);
  }
};

// (row_max, row_sum, col_max, col_sum), each [classes, lines] flat
template <class A, class Kernels>
py::object logsumexp(const py::array& s, const Logits& logits) {
  const Sizes sizes(s, logits.m);
  py::object result;
  logits.with_tile(const_cast<A*>(read<A>("s", s, sizes.count())), sizes, [&](auto tag, const LogitTile<A>& tile) {
    constexpr int C = classes(decltype(tag)::value);
    LogSums<A, C> sums;
    Kernels::logsumexp_tile_of(tag, tile, sums);
    const auto flat = [](const auto& lines, int64_t count) {
      std::vector<A> values;
      for (const auto& of_class : lines) values.insert(values.end(), of_class, of_class + count);
      return array(values);
    };
    result = py::make_tuple(flat(sums.row_max, sizes.n), flat(sums.row_sum, sizes.n), flat(sums.col_max, logits.m),
                            flat(sums.col_sum, logits.m));
  });
  return result;
}

template <class A>
Softmax<A> direction(const Optional& max, const Optional& log, const Optional& grad, int64_t count, int number) {
  return {read<A>("max", max, number * count), read<A>("log", log, number * count),
          read<A>("grad", grad, number * count), count, count};
}

// Rows' Σ ds s; s becomes ds.
template <class A, class Kernels>
py::object softmax(py::array& s, const Logits& logits, const Optional& row_max, const Optional& row_log,
                   const Optional& row_grad, const Optional& col_max, const Optional& col_log,
                   const Optional& col_grad) {
  const Sizes sizes(s, logits.m);
  std::vector<A> ds_dot_s(sizes.n);
  logits.with_tile(written<A>("s", s, sizes.count()), sizes, [&](auto tag, const LogitTile<A>& tile) {
    constexpr int C = classes(decltype(tag)::value);
    Kernels::softmax_tile_of(tag, tile, direction<A>(row_max, row_log, row_grad, sizes.n, C),
                             direction<A>(col_max, col_log, col_grad, logits.m, C), ds_dot_s.data());
  });
  return array(ds_dot_s);
}

// (row_sum, row_slope, Σ ds s, col_sum, col_slope); s becomes ds where a gradient is asked for.
template <class A, class Kernels>
py::object sum(py::array& s, int64_t m, int64_t cols, int64_t offset, double scale, const Optional& row_bias,
               const Optional& row_weight, const Optional& row_ids, const Optional& col_bias,
               const Optional& col_weight, const Optional& col_ids, const std::string& kind,
               const std::string& positives, bool gradient) {
  const Sizes sizes(s, m);
  const int64_t n = sizes.n;
  const SumTile<A> tile{
      written<A>("s", s, sizes.count()),
      sizes.ld,
      n,
      m,
      cols,
      offset,
      static_cast<A>(scale),
      {read<A>("row_bias", row_bias, n), read<A>("row_weight", row_weight, n), read<int64_t>("row_ids", row_ids, n)},
      {read<A>("col_bias", col_bias, m), read<A>("col_weight", col_weight, m), read<int64_t>("col_ids", col_ids, m)},
      positives_of(positives),
      gradient};
  Sums<A> sums;
  Kernels::sum_tile_of(kind_of(kind), tile, sums);
  return py::make_tuple(array(sums.row_sum, n), array(sums.row_slope, n), array(sums.dscores_dot_s, n),
                        array(sums.col_sum, cols), array(sums.col_slope, cols));
}

// Rows' (Σ f(e), Σ f(w - u), Σ slope (w - u)); f becomes the slope where a gradient is asked for.
template <class A, class Kernels>
py::object relation(py::array& f, const py::array& u, const py::array& w, int64_t m, int64_t once, int64_t offset,
                    double lam, const std::string& kind, bool gradient) {
  const Sizes sizes(f, m);
  RelationSums<A> sums;
  Kernels::relation_tile_of(
      RelationTile<A>{written<A>("f", f, sizes.count()), read<A>("u", u, sizes.count()), read<A>("w", w, sizes.count()),
                      sizes.ld, sizes.n, m, once, offset, static_cast<A>(lam), kind_of(kind), gradient},
      sums);
  return py::make_tuple(array(sums.student, sizes.n), array(sums.teachers, sizes.n),
                        array(sums.slope_dot_gap, sizes.n));
}

template <class Kernels>
void bind(py::module_ set) {
  set.def("logsumexp_tile", [](const py::array& s, const Logits& logits) {
    return with_dtype<float, double>("s", s, [&](auto type) { return logsumexp<decltype(type), Kernels>(s, logits); });
  });
  set.def(
      "softmax_tile",
      [](py::array s, const Logits& logits, const Optional& row_max, const Optional& row_log, const Optional& row_grad,
         const Optional& col_max, const Optional& col_log, const Optional& col_grad) {
        return with_dtype<float, double>("s", s, [&](auto type) {
          return softmax<decltype(type), Kernels>(s, logits, row_max, row_log, row_grad, col_max, col_log, col_grad);
        });
      },
      py::arg("s"), py::arg("logits"), py::kw_only(), py::arg("row_max"), py::arg("row_log"), py::arg("row_grad"),
      py::arg("col_max"), py::arg("col_log"), py::arg("col_grad"));
  set.def(
      "sum_tile",
      [](py::array s, int64_t m, int64_t cols, int64_t offset, double scale, const Optional& row_bias,
         const Optional& row_weight, const Optional& row_ids, const Optional& col_bias, const Optional& col_weight,
         const Optional& col_ids, const std::string& kind, const std::string& positives, bool gradient) {
        return with_dtype<float, double>("s", s, [&](auto type) {
          return sum<decltype(type), Kernels>(s, m, cols, offset, scale, row_bias, row_weight, row_ids, col_bias,
                                              col_weight, col_ids, kind, positives, gradient);
        });
      },
      py::arg("s"), py::arg("m"), py::kw_only(), py::arg("cols"), py::arg("offset"), py::arg("scale"),
      py::arg("row_bias"), py::arg("row_weight"), py::arg("row_ids"), py::arg("col_bias"), py::arg("col_weight"),
      py::arg("col_ids"), py::arg("kind"), py::arg("positives"), py::arg("gradient"));
  set.def(
      "relation_tile",
      [](py::array f, const py::array& u, const py::array& w, int64_t m, int64_t once, int64_t offset, double lam,
         const std::string& kind, bool gradient) {
        return with_dtype<float, double>("f", f, [&](auto type) {
          return relation<decltype(type), Kernels>(f, u, w, m, once, offset, lam, kind, gradient);
        });
      },
      py::arg("f"), py::arg("u"), py::arg("w"), py::arg("m"), py::kw_only(), py::arg("once"), py::arg("offset"),
      py::arg("lam"), py::arg("kind"), py::arg("gradient"));
}

}  // namespace

void bind_passes(py::module_& internals) {
  internals.attr("kPassRows") = kPassRows;
  internals.attr("kPassCols") = kPassCols;
  py::class_<Logits>(internals, "Logits")
      .def(py::init([](int64_t m, std::string score, std::vector<double> constants, int64_t offset, bool leave_out,
                       bool columns, Optional row_labels, Optional col_labels, Optional row_bounds,
                       Optional col_bounds) {
             return Logits{m,       score,      constants,  offset,     leave_out,
                           columns, row_labels, col_labels, row_bounds, col_bounds};
           }),
           py::arg("m"), py::arg("score"), py::arg("constants"), py::kw_only(), py::arg("offset") = 0,
           py::arg("leave_out") = false, py::arg("columns") = true, py::arg("row_labels") = py::none(),
           py::arg("col_labels") = py::none(), py::arg("row_bounds") = py::none(), py::arg("col_bounds") = py::none());
  BIND_EACH_SET(bind, internals);
}
