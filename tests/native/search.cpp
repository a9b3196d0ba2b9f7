// Vector kernels of search and ranks: what leaves scores of a tile out, and what counts those that reach a level.
#define GSSF_KERNELS "vector_epilogues.h"
#include "isa.h"

#include "instruction_sets.h"

using namespace gssf;

namespace {

#define KERNELS(set)                     \
  struct set##_kernels {                 \
    FORWARD(set, limit_rows_of)          \
    FORWARD(set, nan_ahead_of)           \
    FORWARD(set, count_rows_of)          \
    FORWARD(set, count_column_levels_of) \
    FORWARD(set, count_columns_of)       \
  };
FOR_EACH_SET(KERNELS)

// (greater, reaching) of levels, those of anchor i at starts[i] .. starts[i + 1].
template <class A, class F>
py::object counted(const py::array& levels, const py::array& starts, int64_t anchors, F f) {
  const int64_t count = levels.size();
  std::vector<int64_t> greater(count, 0), reaching(count, 0), bins(2 * (count + 1), -7);
  f(read<A>("levels", levels, count), read<int64_t>("starts", starts, anchors + 1), bins.data(), greater.data(),
    reaching.data());
  return py::make_tuple(array(greater), array(reaching));
}

template <class A, class Kernels>
py::object count_columns(const py::array& s, int64_t m, const py::array& level) {
  using Lane = typename Simd<A>::Lane;
  const int64_t n = s.shape(0), width = ceil_div(m, Simd<A>::lanes) * Simd<A>::lanes;
  std::vector<Lane> greater(width, 0), reaching(width, 0);
  Kernels::count_columns_of(read<A>("s", s, n * kTileMost), n, m, read<A>("level", level, width), greater.data(),
                            reaching.data());
  return py::make_tuple(array(greater.data(), m), array(reaching.data(), m));
}

template <class Kernels>
void bind(py::module_ set) {
  set.def("limit_rows", [](py::array s, int64_t m, const py::array& most) {
    with_dtype<float, double>("s", s, [&](auto type) -> py::object {
      using A = decltype(type);
      const int64_t n = s.shape(0);
      Kernels::limit_rows_of(written<A>("s", s, n * kTileMost), n, m, read<A>("most", most, n));
      return py::none();
    });
  });
  set.def("nan_ahead", [](py::array s, int64_t m) {
    with_dtype<float, double>("s", s, [&](auto type) -> py::object {
      using A = decltype(type);
      Kernels::nan_ahead_of(written<A>("s", s, s.shape(0) * kTileMost), s.shape(0), m);
      return py::none();
    });
  });
  set.def("count_rows", [](const py::array& s, int64_t m, const py::array& levels, const py::array& starts) {
    return with_dtype<float, double>("s", s, [&](auto type) {
      using A = decltype(type);
      const int64_t n = s.shape(0);
      return counted<A>(levels, starts, n, [&](const A* level, const int64_t* start, auto*... counts) {
        Kernels::count_rows_of(read<A>("s", s, n * kTileMost), n, m, level, start, counts...);
      });
    });
  });
  set.def("count_column_levels", [](const py::array& s, int64_t m, const py::array& levels, const py::array& starts) {
    return with_dtype<float, double>("s", s, [&](auto type) {
      using A = decltype(type);
      const int64_t n = s.shape(0);
      return counted<A>(levels, starts, m, [&](const A* level, const int64_t* start, auto*... counts) {
        Kernels::count_column_levels_of(read<A>("s", s, n * kTileMost), n, m, level, start, counts...);
      });
    });
  });
  set.def("count_columns", [](const py::array& s, int64_t m, const py::array& level) {
    return with_dtype<float, double>("s", s,
                                     [&](auto type) { return count_columns<decltype(type), Kernels>(s, m, level); });
  });
}

}  // namespace

void bind_search(py::module_& internals) { BIND_EACH_SET(bind, internals); }
