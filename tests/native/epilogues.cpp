// Vector kernels of the sweep's epilogues: a tile's maxima, terms of relative negatives, and what certified mining does
// to rows and tiles.
#define GSSF_KERNELS "vector_epilogues.h"
#include "isa.h"

#include "instruction_sets.h"

using namespace gssf;

namespace {

#define KERNELS(set)             \
  struct set##_kernels {         \
    FORWARD(set, tile_maxima_of) \
    FORWARD(set, tile_terms_of)  \
    FORWARD(set, round_row_of)   \
    FORWARD(set, exact_dot_of)   \
    FORWARD(set, mask_ids_of)    \
    FORWARD(set, tile_tops_of)   \
    FORWARD(set, reaching_of)    \
  };
FOR_EACH_SET(KERNELS)

int64_t whole_vectors(int64_t count, int64_t lanes) { return ceil_div(count, lanes) * lanes; }

// s [n, kTileMost], of which m columns are a tile's.
template <class A>
int64_t tile_rows(const py::array& s, int64_t m) {
  expect(s.ndim() == 2 && s.shape(1) == kTileMost && s.shape(0) <= kTileMost && 0 < m && m <= kTileMost,
         "s: expected up to kTileMost rows of kTileMost scores, and m of up to as many");
  return s.shape(0);
}

template <class A, class Kernels>
py::object tile_maxima(py::array& s, int64_t m, const std::optional<py::array>& row_id,
                       const std::optional<py::array>& col_id) {
  using Lane = typename Simd<A>::Lane;
  const int64_t n = tile_rows<A>(s, m);
  TileMaxima<A> maxima;
  Kernels::tile_maxima_of(written<A>("s", s, n * kTileMost), n, m, read<Lane>("row_id", row_id, n),
                          read<Lane>("col_id", col_id, whole_vectors(m, Simd<A>::lanes)), Limits<A>{}, true, maxima);
  return py::make_tuple(array(maxima.rows.score.data(), n), array(maxima.rows.index.data(), n),
                        array(maxima.cols.score.data(), m), array(maxima.cols.index.data(), m));
}

template <class A>
void set_maxima(Maxima<A>& maxima, const py::array& score, const py::array& index, int64_t count) {
  std::copy_n(read<A>("score", score, count), count, maxima.score.data());
  std::copy_n(read<typename Simd<A>::Lane>("index", index, count), count, maxima.index.data());
}

template <class A, class Kernels>
py::object tile_terms(const py::array& s, int64_t m, const py::array& row_score, const py::array& row_index,
                      const py::array& col_score, const py::array& col_index, double least,
                      std::optional<double> beta) {
  const int64_t n = tile_rows<A>(s, m);
  TileMaxima<A> best;
  TileTerms<A> terms;
  const A exponent = beta ? static_cast<A>(*beta) : A(0);
  set_maxima(best.rows, row_score, row_index, n), set_maxima(best.cols, col_score, col_index, m);
  std::fill(best.cols.score.begin() + m, best.cols.score.end(), -std::numeric_limits<A>::infinity());
  std::fill(best.cols.index.begin() + m, best.cols.index.end(), -1);
  Kernels::tile_terms_of(read<A>("s", s, n * kTileMost), n, m, best, static_cast<A>(least), beta ? &exponent : nullptr,
                         Limits<A>{}, true, terms);
  return py::make_tuple(array(terms.rows.sum.data(), n), array(terms.rows.count.data(), n),
                        array(terms.rows.ties.data(), n), array(terms.cols.sum.data(), m),
                        array(terms.cols.count.data(), m), array(terms.cols.ties.data(), m));
}

// (bits of bf16 [padded], Σ x², Σ (x - rounded)²)
template <class T, class Kernels>
py::object round_row(const py::array& x, int64_t padded) {
  expect(padded >= x.size() && padded % 32 == 0, "padded: expected a multiple of 32, of at least all channels");
  std::vector<uint16_t> bits(padded, 7);
  float squares[2] = {};
  Kernels::round_row_of(read<T>("x", x, x.size()), x.size(), padded, bits.data(), squares);
  return py::make_tuple(array(bits), squares[0], squares[1]);
}

// most: the largest scores of rows and of columns that count, or none.
template <class Kernels>
int64_t reaching(const py::array& s, int64_t m, const py::array& row_least, const std::optional<py::array>& col_least,
                 py::array& places, const std::optional<py::array>& row_most,
                 const std::optional<py::array>& col_most) {
  const int64_t n = tile_rows<float>(s, m), width = whole_vectors(m, Simd<float>::lanes);
  return Kernels::reaching_of(read<float>("s", s, n * kTileMost), n, m, read<float>("row_least", row_least, n),
                              read<float>("col_least", col_least, width), read<float>("row_most", row_most, n),
                              read<float>("col_most", col_most, width),
                              written<int32_t>("places", places, n * kTileMost));
}

template <class Kernels>
void bind(py::module_ set) {
  set.def("tile_maxima",
          [](py::array s, int64_t m, const std::optional<py::array>& row_id, const std::optional<py::array>& col_id) {
            return with_dtype<float, double>(
                "s", s, [&](auto type) { return tile_maxima<decltype(type), Kernels>(s, m, row_id, col_id); });
          });
  set.def("tile_terms",
          [](const py::array& s, int64_t m, const py::array& row_score, const py::array& row_index,
             const py::array& col_score, const py::array& col_index, double least, std::optional<double> beta) {
            return with_dtype<float, double>("s", s, [&](auto type) {
              return tile_terms<decltype(type), Kernels>(s, m, row_score, row_index, col_score, col_index, least, beta);
            });
          });
  set.def("round_row", [](const py::array& x, int64_t padded) {
    return with_dtype<float, c10::Half, c10::BFloat16>(
        "x", x, [&](auto type) { return round_row<decltype(type), Kernels>(x, padded); });
  });
  set.def("exact_dot", [](const py::array& x, const py::array& y) {
    return with_dtype<float, c10::Half, c10::BFloat16>("x", x, [&](auto type) -> py::object {
      using T = decltype(type);
      const int64_t dim = x.size();
      const T *left = read<T>("x", x, dim), *right = read<T>("y", y, dim);
      return py::float_(Kernels::exact_dot_of(left, right, dim, left, right));
    });
  });
  set.def("mask_ids", [](py::array s, int64_t m, const py::array& row_id, const py::array& col_id) {
    const int64_t n = tile_rows<float>(s, m);
    Kernels::mask_ids_of(written<float>("s", s, n * kTileMost), n, m, read<int32_t>("row_id", row_id, n),
                         read<int32_t>("col_id", col_id, whole_vectors(m, Simd<float>::lanes)),
                         -std::numeric_limits<float>::infinity());
  });
  set.def(
      "tile_tops",
      [](const py::array& s, int64_t m, const std::optional<py::array>& row_most,
         const std::optional<py::array>& col_most) {
        const int64_t n = tile_rows<float>(s, m);
        PerAnchor<float> row, col;
        Kernels::tile_tops_of(read<float>("s", s, n * kTileMost), n, m, read<float>("row_most", row_most, n),
                              read<float>("col_most", col_most, whole_vectors(m, Simd<float>::lanes)), row.data(),
                              col.data());
        return py::make_tuple(array(row.data(), n), array(col.data(), m));
      },
      py::arg("s"), py::arg("m"), py::arg("row_most") = py::none(), py::arg("col_most") = py::none());
  set.def(
      "reaching",
      [](const py::array& s, int64_t m, const py::array& row_least, const std::optional<py::array>& col_least,
         py::array places, const std::optional<py::array>& row_most, const std::optional<py::array>& col_most) {
        return reaching<Kernels>(s, m, row_least, col_least, places, row_most, col_most);
      },
      py::arg("s"), py::arg("m"), py::arg("row_least"), py::arg("col_least"), py::arg("places"),
      py::arg("row_most") = py::none(), py::arg("col_most") = py::none());
}

}  // namespace

void bind_epilogues(py::module_& internals) {
  std::vector<std::string> sets = {"plain"};
#ifdef GSSF_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v3")) sets.push_back("v3");
  if (__builtin_cpu_supports("x86-64-v4")) sets.push_back("v4");
#endif
  internals.attr("instruction_sets") = sets;  // those that this processor can run
  internals.attr("kTileMost") = kTileMost;
  BIND_EACH_SET(bind, internals);
}
