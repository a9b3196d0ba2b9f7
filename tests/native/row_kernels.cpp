// Vector kernels of rows: the projection and its backward, scores of listed pairs and the gather of their gradients.
#define GSSF_KERNELS "row_kernels.h"
#include "isa.h"

#include "instruction_sets.h"

// Defined in csrc/edges.h, which needs ATen; here edges come grouped.
gssf::Groups::Groups(const int64_t*, const int64_t*, int64_t edges, int64_t destinations)
    : first(destinations + 1, 0), edge(edges) {}

using namespace gssf;

namespace {

#define KERNELS(set)              \
  struct set##_kernels {          \
    FORWARD(set, project_run)     \
    FORWARD(set, backward_run)    \
    FORWARD(set, pair_scores_run) \
    FORWARD(set, gather_run)      \
  };
FOR_EACH_SET(KERNELS)

using Optional = std::optional<py::array>;

// A metric's weights as csrc/project.cpp makes them, but for NaN in the padding, of which nothing may come.
template <class A>
Weights<A> weights_of(int64_t dim, const Optional& diag, const Optional& blocks, const Optional& permutation,
                      bool normalize, bool backward) {
  Weights<A> weights;
  weights.dim = dim, weights.normalize = normalize;
  if (diag) weights.diag.assign(read<A>("diag", *diag, dim), read<A>("diag", *diag, dim) + dim);
  if (blocks) {
    const int64_t width = blocks->shape(1);
    const A* from = read<A>("blocks", *blocks, dim * width);
    weights.groups = dim / width, weights.width = width;
    weights.ld = (width / Simd<A>::lanes + 2) * Simd<A>::lanes;
    auto& rows = backward ? weights.transposed : weights.blocks;
    rows.assign(dim * weights.ld, std::numeric_limits<A>::quiet_NaN());
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t k = 0; k < width; ++k)
        rows[c * weights.ld + k] = from[backward ? (c / width * width + k) * width + c % width : c * width + k];
  }
  if (permutation) {
    const int64_t* order = read<int64_t>("permutation", *permutation, dim);
    weights.permutation.assign(order, order + dim);
  }
  return weights;
}

int64_t rows_of_a_chunk(const py::array& x) {
  expect(x.ndim() == 2 && x.shape(0) <= kChunkRows, "x: expected a matrix of up to kChunkRows rows");
  return x.shape(0);
}

template <class A, class Kernels>
py::object project(const py::array& x, const Optional& diag, const Optional& blocks, const Optional& permutation,
                   bool normalize) {
  const int64_t rows = rows_of_a_chunk(x), dim = x.shape(1);
  const auto weights = weights_of<A>(dim, diag, blocks, permutation, normalize, false);
  Scratch<A> scratch(weights, false);
  std::vector<A> projected(rows * dim);
  Kernels::project_run(read<A>("x", x, rows * dim), weights, scratch, projected.data(), rows);
  return array(projected);
}

// (dx, ddiag, dblocks), flat
template <class A, class Kernels>
py::object project_backward(const py::array& grad_out, const py::array& x, const Optional& diag, const Optional& blocks,
                            const Optional& permutation, bool normalize) {
  const int64_t rows = rows_of_a_chunk(x), dim = x.shape(1);
  const auto weights = weights_of<A>(dim, diag, blocks, permutation, normalize, true);
  Scratch<A> scratch(weights, true);
  std::vector<A> dx(rows * dim), ddiag(dim), dblocks(dim * weights.width);
  Upstream<A, A> upstream;
  upstream.dense = read<A>("grad_out", grad_out, rows * dim);
  Kernels::backward_run(upstream, read<A>("x", x, rows * dim), weights, scratch, dx.data(), ddiag.data(),
                        blocks ? dblocks.data() : nullptr, 0, rows);
  return py::make_tuple(array(dx), array(ddiag), array(dblocks));
}

template <class A, class Kernels>
py::object pair_scores(const py::array& a, const py::array& b, const py::array& rows, const py::array& cols) {
  const int64_t dim = a.shape(1), edges = rows.size();
  std::vector<A> scores(edges);
  Kernels::pair_scores_run(read<A>("a", a, a.size()), read<A>("b", b, b.size()), read<int64_t>("rows", rows, edges),
                           read<int64_t>("cols", cols, edges), scores.data(), dim, 0, edges);
  return array(scores);
}

// Row d of the result is the sum over e of edge[first[d] : first[d + 1]] of grad[e] * x[source[e]].
template <class A, class Kernels>
py::object gather(const py::array& x, const py::array& source, const py::array& grad, const py::array& first,
                  const py::array& edge) {
  const int64_t dim = x.shape(1), edges = source.size(), destinations = first.size() - 1;
  Groups groups(nullptr, nullptr, edges, destinations);
  std::copy_n(read<int64_t>("first", first, destinations + 1), destinations + 1, groups.first.begin());
  std::copy_n(read<int64_t>("edge", edge, edges), edges, groups.edge.begin());
  std::vector<A> gathered(destinations * dim);
  Kernels::gather_run(read<A>("x", x, x.size()), read<int64_t>("source", source, edges), read<A>("grad", grad, edges),
                      groups, gathered.data(), dim, 0, destinations);
  return array(gathered);
}

template <class Kernels>
void bind(py::module_ set) {
  set.def("project", [](const py::array& x, const Optional& diag, const Optional& blocks, const Optional& permutation,
                        bool normalize) {
    return with_dtype<float, double>(
        "x", x, [&](auto type) { return project<decltype(type), Kernels>(x, diag, blocks, permutation, normalize); });
  });
  set.def("project_backward", [](const py::array& grad_out, const py::array& x, const Optional& diag,
                                 const Optional& blocks, const Optional& permutation, bool normalize) {
    return with_dtype<float, double>("x", x, [&](auto type) {
      return project_backward<decltype(type), Kernels>(grad_out, x, diag, blocks, permutation, normalize);
    });
  });
  set.def("pair_scores", [](const py::array& a, const py::array& b, const py::array& rows, const py::array& cols) {
    return with_dtype<float, double>("a", a,
                                     [&](auto type) { return pair_scores<decltype(type), Kernels>(a, b, rows, cols); });
  });
  set.def("gather", [](const py::array& x, const py::array& source, const py::array& grad, const py::array& first,
                       const py::array& edge) {
    return with_dtype<float, double>(
        "x", x, [&](auto type) { return gather<decltype(type), Kernels>(x, source, grad, first, edge); });
  });
}

}  // namespace

void bind_row_kernels(py::module_& internals) {
  internals.attr("kChunkRows") = kChunkRows;
  BIND_EACH_SET(bind, internals);
}
